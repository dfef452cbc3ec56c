"""Bundles for a Snapdragon, built once."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyrexport.cli import main
from pyrexport.targets.qnn import session

SMALL = ("--resolution", "17x64x64")


@pytest.fixture(scope="session")
def tiny(make_checkpoint) -> Path:
    """Two stages of one block, and a text encoder, which stays on the CPU."""
    return make_checkpoint("--blocks", "1", "--stages", "2", "--no-vae", *SMALL)


@pytest.fixture(scope="session")
def make(shared, tiny):
    """`make("--soc", "sm8750")`: a bundle of the tiny checkpoint; `of=` another one."""

    def build(*options: str, of: Path = tiny) -> Path:
        def write(folder: Path) -> None:
            words = ("build", str(of), "--target", "qnn", "-o", str(folder), "--quiet", *options)
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, result.output

        return shared(["bundle of qnn", str(of), *options], write)

    return build


@pytest.fixture(scope="session")
def bundle(make) -> Path:
    return make("--soc", "sm8650,8 Elite", "--soc", "Snapdragon 8 Gen 3")


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    """The chips of which it was said that they are emulated, in place of a line for the first of them."""
    chips: list[str] = []
    monkeypatch.setattr(session, "_say_emulated", lambda chip: chips.append(chip.name))
    return chips


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def recipe(shared, tiny) -> Path:
    """A recipe of integers of 8 bits."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "prompts.txt").write_text("a cat\na red dog\n")
        words = ("calibrate", str(tiny), "-o", str(folder / "recipe.safetensors"), "--quantize", "w8a8")
        words += ("--prompts", str(folder / "prompts.txt"), "--schedule", "1-1", "--quiet")
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output

    return Path(shared(["recipe for qnn"], write)) / "recipe.safetensors"
