"""Traces, and a bundle that is not square with its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import build
from pyrexport.cli import main
from support.parity import OBLONG

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def record(shared: Make, make_checkpoint: Make) -> Make:
    """`record("--no-vae", how=("--schedule", "6"))`: a trace of a tiny checkpoint, by the command that users call."""

    def make(*arguments: str, how: tuple[str, ...] = ()) -> Path:
        checkpoint = make_checkpoint(*arguments)

        def write(trace: Path) -> None:
            command = ["parity", "--record", str(trace), "--reference", str(checkpoint), "--quiet", *how]
            result = CliRunner().invoke(main, [*command, "--prompt", "a red circle"])
            assert result.exit_code == 0, result.output

        return shared(("trace", *arguments, "of", *how), write)

    return make


@pytest.fixture(scope="session")
def oblong(make_checkpoint: Make) -> Path:
    """A tiny checkpoint that is not square. Not to be changed: copy it."""
    return make_checkpoint(*OBLONG)


@pytest.fixture(scope="session")
def good(shared: Make, oblong: Path, record: Make) -> tuple[Path, Path]:
    """Its bundle, and its trace."""
    return shared(["oblong bundle"], lambda out: build(oblong, out)), record(*OBLONG)


@pytest.fixture
def copy(good: tuple[Path, Path], tmp_path: Path) -> Path:
    """That bundle, to be changed."""
    return Path(shutil.copytree(good[0], tmp_path / "bundle"))
