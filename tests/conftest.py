"""Checkpoints that several tests read, made once."""

import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from pyrexport.cli import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
DATA = ROOT / "tests" / "data"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: threads of one that wait for work would take the cores of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
gc.set_threshold(50_000)  # exports make so many objects that looking for garbage among them was a fifteenth of a build
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pyrexport-tests-")

Make = Callable[..., Path]
LONGEST = (
    "targets/trt/test_networks.py",
    "export/bundle/test_build.py",
    "targets/executorch/test_memory.py",
    "package/test_readme.py",
    "demonstration/test_moving_shapes.py",
    "demonstration/test_demonstration.py",
    "export/bundle/test_holdings.py",
    "targets/executorch/test_build.py",
    "export/bundle/test_resolutions.py",
    "runtime/proof/test_parity.py",
    "targets/ort/test_providers.py",
    "targets/qnn/test_bundle.py",
    "export/bundle/test_interruption.py",
    "targets/trt/test_build.py",
    "runtime/bundle/test_tiles.py",
    "targets/test_foreign_target.py",
)
"""Files that take longest. The first two share no bundle: one process would wait until the other one has built it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def engines_take_one_core() -> None:
    """As for `OMP_NUM_THREADS`: by default they have a thread for each core that this names, and those wait by turning.

    Processes that tests start have the machine's.
    """
    os.sched_getaffinity = lambda process: {0}


@pytest.fixture(scope="session", autouse=True)
def exports_are_made_once() -> None:
    """PyTorch's exporter lists all of ONNX's operators and its own anew for each graph: a fourth of a tiny export."""
    from support.exporting import translate_once
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    translate_once()

    make = cache(ONNXRegistry.from_torchlib)

    def listed(**options: int) -> ONNXRegistry:
        found = ONNXRegistry()
        found._opset_version = make(**options).opset_version
        found.functions = {name: list(known) for name, known in make(**options).functions.items()}
        return found

    ONNXRegistry.from_torchlib = staticmethod(listed)
    utils._materialize_cpp_cia_ops = cache(utils._materialize_cpp_cia_ops)


@pytest.fixture
def exports_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what compares one export with another."""
    from pyrexport.export.lowering import onnx
    from support.exporting import translate

    monkeypatch.setattr(onnx, "_translate", translate)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Iterable[str], Callable[[Path], None]], Path]:
    """`shared(key, make)`: what `make(path)` writes, once for all processes that test side by side."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # pytest-xdist gives each process a folder in it

    def get(key: Iterable[str], make: Callable[[Path], None]) -> Path:
        folder = root / hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
        with FileLock(f"{folder}.lock"):
            if not (folder / "done").exists():
                folder.mkdir()
                make(folder / "it")
                (folder / "done").touch()
        return folder / "it"

    return get


@pytest.fixture(scope="session")
def make_checkpoint(shared: Make) -> Make:
    """`make_checkpoint("--kind", "plain")`: a tiny random checkpoint; the same arguments give the same folder."""

    def make(*arguments: str) -> Path:
        def write(out: Path) -> None:
            result = CliRunner().invoke(main, ["init", "--random", "tiny", "-o", str(out), "--quiet", *arguments])
            assert result.exit_code == 0, result.output

        return shared(("checkpoint", *arguments), write)

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: Make) -> Path:
    """A tiny pyramidal checkpoint with all parts. Not to be changed: copy it."""
    return make_checkpoint()


def build(checkpoint: Path, out: Path, *options: str) -> None:
    """`pyrexport build` for ONNX Runtime."""
    command = ["build", str(checkpoint), "--target", "ort", "-o", str(out), "--quiet", *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="session")
def make_bundle(shared: Make, make_checkpoint: Make) -> Make:
    """`make_bundle("--kind", "ppf", precision="bf16")`: a bundle of a tiny checkpoint, with options of `build`."""

    def make(*arguments: str, **options: str) -> Path:
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        checkpoint = make_checkpoint(*arguments)
        return shared(
            ("bundle", *arguments, *given), lambda out: build(checkpoint, out, *given, "--resolution", "17x64x64")
        )

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: Make) -> Path:
    """A bundle of the tiny pyramidal checkpoint. Not to be changed: copy it."""
    return make_bundle()


@pytest.fixture(scope="session")
def lean_recipe(shared: Make, make_checkpoint: Make) -> Path:
    """A recipe of a tiny pyramidal transformer alone, on two prompts' noise. Not to be changed."""

    def write(out: Path) -> None:
        out.mkdir()
        (out / "prompts.txt").write_text("a cat\na dog\n")
        checkpoint = make_checkpoint("--no-text-encoder", "--no-vae")
        command = ["calibrate", str(checkpoint), "--prompts", str(out / "prompts.txt"), "--resolution", "17x64x64"]
        result = CliRunner().invoke(main, [*command, "-o", str(out / "recipe.safetensors"), "--quiet"])
        assert result.exit_code == 0, result.output

    return shared(["lean recipe"], write) / "recipe.safetensors"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of that bundle, to be changed."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    return folder


@pytest.fixture(scope="session")
def shapes_bundle(shared: Make) -> Path:
    """A bundle of the demonstration checkpoint. Not to be changed: copy it."""
    return shared(["shapes"], lambda out: build(DATA / "moving-shapes", out))


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return run


@pytest.fixture
def refused(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command line that must be refused with exit code 2 and one line; returns the line."""

    def run(*arguments: object) -> str:
        result = cli(*arguments)
        assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), result.exception
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("Error: ")
        assert result.stdout == ""
        return line

    return run
