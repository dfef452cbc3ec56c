"""Checkpoints that several tests read, made once."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from pyrexport.cli import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
DATA = ROOT / "tests" / "data"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: threads of one that wait for work would take the cores of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pyrexport-tests-")

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make_checkpoint("--kind", "plain")`: a tiny random checkpoint; the same arguments give the same folder."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*arguments: str) -> Path:
        if arguments not in made:
            out = tmp_path_factory.mktemp("checkpoint") / "tiny"
            command = [
                sys.executable,
                str(SCRIPTS / "make_random_checkpoint.py"),
                str(out),
                "--quiet",
                *arguments,
            ]
            subprocess.run(command, check=True, capture_output=True)
            made[arguments] = out
        return made[arguments]

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint: Make) -> Path:
    """A tiny pyramidal checkpoint with all parts. Not to be changed: copy it."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def make_bundle(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make_bundle("--kind", "ppf", precision="bf16")`: a bundle of a tiny checkpoint, at 17x64x64; options of `build`."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*arguments: str, **options: str) -> Path:
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        key = (*arguments, *given)
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "bundle"
            command = ["build", str(make_checkpoint(*arguments)), "--target", "ort", "-o", str(out), "--quiet"]
            result = CliRunner().invoke(main, [*command, *given, "--resolution", "17x64x64"])
            assert result.exit_code == 0, result.output
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: Make) -> Path:
    """A bundle of the tiny pyramidal checkpoint. Not to be changed: copy it."""
    return make_bundle()


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demonstration checkpoint. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("shapes") / "bundle"
    command = ["build", str(DATA / "moving-shapes"), "--target", "ort", "-o", str(out), "--quiet"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return out


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
