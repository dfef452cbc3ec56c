"""The target of docs/target.md: a package of its own, of which pyrexport holds no line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from check_docs import blocks
from conftest import ROOT

PAGE = (ROOT / "docs" / "target.md").read_text("utf-8")
(PYPROJECT,) = blocks(PAGE, "toml")
INIT, DIALECT = blocks(PAGE, "python")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed, with pip, beside pyrexport."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "plainly").mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "plainly" / "__init__.py").write_text(INIT)
    (source / "plainly" / "dialect.py").write_text(DIALECT)
    how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(source)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(site)}


def run(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "pyrexport.cli", *(str(a) for a in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_it_builds_samples_and_passes_parity(
    installed: dict[str, str], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """From the command line, with its own dialect, operators, options and session; about 40 s."""
    checkpoint, out = make_checkpoint("--stages", "1"), tmp_path / "plain.pyrx"
    small = ("--resolution", "17x64x64", "--quiet")
    run(installed, "build", checkpoint, "--target", "plainly", "--colour", "blue", "-o", out, *small)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["target"], manifest["engine"]["name"]) == ("plainly", "onnx")
    assert manifest["target_options"] == {"colour": "blue"}
    assert "Attention" in manifest["graphs"]["stage0"]["facts"]["operators"]
    clip = tmp_path / "clip.npz"
    run(installed, "sample", out, "--prompt", "a cat", "--schedule", "1", "-o", clip, "--chatty", "--quiet")
    assert clip.is_file()
    how = ("--prompt", "a cat", "--schedule", "1", "--json", "--quiet")
    result = json.loads(run(installed, "parity", out, "--reference", checkpoint, *how))
    assert result["passed"] is True
    assert set(result["levels"]) == {"text", "stages", "chain", "vae", "video"}
    assert max(level["relative_l2"] for name, level in result["levels"].items() if name != "video") < 1e-5
    assert json.loads(run(installed, "inspect", out, "--json"))["facts"]["stage0"]["colour"] == "blue"
