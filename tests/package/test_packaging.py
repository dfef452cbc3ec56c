"""What is installed, what it imports, and what it weighs."""

import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pyrexport
import pytest
from check_image import stages
from conftest import DATA, ROOT
from distribution import PACKAGES, PLUGIN, build, check_wheel, install
from support.prompts import LENGTH, PROMPTS, ids_in_diffusers, write_own_tokenizer

CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed():
    found = {"pyrexport"}
    for floor in PACKAGES:
        for init in (ROOT / floor).rglob("__init__.py"):
            found.add(".".join(("pyrexport", *init.parent.relative_to(ROOT).parts)))
    assert found == set(CONFIG["tool"]["setuptools"]["packages"])


def test_the_page_for_an_index_names_every_extra_of_users():
    page = (ROOT / CONFIG["project"]["readme"]).read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [
        name for name in CONFIG["project"]["optional-dependencies"] if name not in ("docs", "dev")
    ]


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = CONFIG["project"]
    for requirement in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        name = requirement.split(">")[0].split("<")[0].split("=")[0].split("[")[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement


@pytest.mark.parametrize("module", ["pyrexport", "pyrexport.runtime", "pyrexport.runtime.chain.sampler"])
def test_imports_pull_in_numpy_and_the_standard_library_alone(module):
    code = f"""
import sys
import numpy.random  # compiled with Cython, whose helper module is not part of NumPy's package
before = set(sys.modules)
import {module}
import json
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    # `__mp_main__` and the editable finders are installed by site, not by us.
    foreign = {name for name in json.loads(output) if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign <= {"numpy", "pyrexport"}


def test_no_module_of_the_runtime_names_a_heavy_library():
    """import-linter sees imports; this sees `importlib.import_module("torch")` too."""
    for file in (ROOT / "runtime").rglob("*.py"):
        assert "import_module" not in file.read_text(), file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    (built,) = build(tmp_path_factory.mktemp("wheel"), "--wheel")
    return built


def test_the_wheel_holds_the_package_and_nothing_stray(wheel):
    check_wheel(wheel)
    assert wheel.name.split("-")[1] == pyrexport.__version__


def test_optimum_finds_its_command(tmp_path):
    """By optimum's own command line, in two processes: about 5 s."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "pyrexport"]
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / PLUGIN), os.environ.get("PYTHONPATH", "")])}
    helped, refused = (
        subprocess.run([*command, *given], cwd=tmp_path, env=own, capture_output=True, text=True)
        for given in (["--help"], ["absent", "--target", "ort", "-o", "out.pyrx", "--quiet"])
    )
    assert helped.stdout.startswith("Usage: pyrexport build [OPTIONS] CHECKPOINT"), helped.stderr
    assert refused.returncode == 2
    assert "absent" in refused.stderr


def test_steps_of_the_image_are_read_as_they_stand():
    first, last = stages((ROOT / "Dockerfile").read_text("utf-8"))
    assert [len(stage.commands) for stage in (first, last)] == [2, 1]
    assert last.settings == {"WHEELS": "/wheels", "HOME": "/tmp"}
    assert last.entry == list(CONFIG["project"]["scripts"])


@pytest.fixture(scope="module")
def lean(wheel, tmp_path_factory) -> Path:
    """An environment with the base dependencies alone: no torch, no diffusers, no onnx."""
    return install(tmp_path_factory.mktemp("lean"), wheel)


@pytest.mark.slow
def test_the_wheel_inspects_a_checkpoint_without_torch(lean):
    """The environment takes about 30 s."""
    run = [str(lean / "pyrexport"), "inspect", str(DATA / "moving-shapes"), "--json"]
    document = json.loads(subprocess.run(run, check=True, capture_output=True, text=True, cwd="/").stdout)
    assert document["kind"] == "pyramidal"


@pytest.mark.slow
def test_a_prompt_has_the_same_tokens_without_diffusers(lean, tmp_path):
    """Those that diffusers gives the text encoder in this environment; a second beside the lean one."""
    tokenizer = write_own_tokenizer(tmp_path / "tokenizer")
    code = f"""
import json, pathlib, sys
from pyrexport.runtime.pipeline.text import Tokenizer
tokenizer = Tokenizer(pathlib.Path({str(tokenizer)!r}), {LENGTH})
print(json.dumps([tokenizer(prompt).ids for prompt in json.load(sys.stdin)]))
"""
    command, given = [lean / "python", "-c", code], json.dumps(PROMPTS)
    done = subprocess.run(command, input=given, check=True, capture_output=True, text=True, cwd="/")
    assert json.loads(done.stdout) == [ids_in_diffusers(tokenizer.parent, prompt, LENGTH) for prompt in PROMPTS]


@pytest.mark.slow
def test_the_runtime_samples_and_proves_itself_without_torch(lean, shapes_bundle, cli, tmp_path):
    """The demonstration, from the command line and from Python, in the lean environment: about 40 s."""
    bundle, trace = shapes_bundle, tmp_path / "trace.safetensors"
    few = ("--schedule", "2-2-1", "--quiet")
    how = ("--prompt", "a red circle moving left", *few)
    assert cli("parity", "--record", trace, "--reference", DATA / "moving-shapes", *how).exit_code == 0

    def run(*arguments: object) -> str:
        command = [str(a) for a in arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout

    told = ("--html", tmp_path / "parity.html", "--json", "--quiet")
    document = json.loads(run(lean / "pyrexport", "parity", bundle, "--trace", trace, *told))
    assert document["passed"] is True
    assert "parity passed" in (tmp_path / "parity.html").read_text("utf-8")
    assert set(document["levels"]) == {"text", "stages", "chain", "vae", "tiny_decoder", "video"}
    run(lean / "pyrexport", "sample", bundle, "--prompt", "a cat", "-o", tmp_path / "frames", *few)
    assert len(list((tmp_path / "frames").glob("*.png"))) == 17
    code = f"""
import sys, pyrexport
with pyrexport.load({str(bundle)!r}) as pipeline:
    assert pipeline("a red circle moving left", seed=0, schedule="2-2-1").frames.shape == (17, 128, 128, 3)
absent = ["torch", "diffusers", "transformers", "onnx", "safetensors", "av"]
import importlib.util
assert not any(importlib.util.find_spec(name) for name in absent)
"""
    run(lean / "python", "-c", code)
    command = [lean / "pyrexport", "sample", bundle, "--prompt", "a", "-o", tmp_path / "a.mp4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'pyrexport[video]'" in result.stderr
