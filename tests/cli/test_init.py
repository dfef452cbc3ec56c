"""`init`: what it refuses, and what it leaves alone or replaces whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from pyrexport.export.init import random

Refused = Callable[..., str]
Cli = Callable[..., Result]
Make = Callable[..., Path]


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file under a folder, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_random_checkpoint_is_made_of_nothing(tiny: Path, refused: Refused, tmp_path: Path) -> None:
    line = refused("init", tiny, "--random", "tiny", "-o", tmp_path / "out")
    assert f"leave {tiny} out" in line
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_made_of_something(refused: Refused, tmp_path: Path) -> None:
    line = refused("init", "-o", tmp_path / "out")
    assert "give a SOURCE, or --random tiny|" in line
    assert not list(tmp_path.iterdir())


def test_an_unknown_preset_is_refused_with_the_known_ones(refused: Refused, tmp_path: Path) -> None:
    line = refused("init", "--random", "huge", "-o", tmp_path / "out")
    assert all(name in line for name in ("huge", "tiny", "wan2.1-1.3b", "wan2.1-14b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "60"], "multiple of the head size 16, found 60"),
        (["--kind", "plain", "--stages", "2"], "a plain model has one stage, found 2"),
        (["--wavelet", "db99"], "unknown wavelet 'db99'"),
        (["--resolution", "17x64x72"], "multiple of 64"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(
    refused: Refused, tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in refused("init", "--random", "tiny", "-o", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_replaced_only_by_force(refused: Refused, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("init", "--random", "tiny", "-o", out, "--quiet").exit_code == 0
    before = digests(out)
    assert "give --force" in refused("init", "--random", "tiny", "-o", out, "--seed", "1", "--quiet")
    assert digests(out) == before


@pytest.mark.parametrize("file", ["notes.txt", "manifest.json", "transformer/config.json"])
def test_a_folder_that_is_no_checkpoint_is_not_replaced_even_by_force(
    refused: Refused, tmp_path: Path, file: str
) -> None:
    out = tmp_path / "out"
    (out / file).parent.mkdir(parents=True)
    (out / file).write_text("mine")
    assert "is not a checkpoint" in refused("init", "--random", "tiny", "-o", out, "--force", "--quiet")
    assert (out / file).read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_is_not_replaced_by_a_checkpoint(refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert "is a file" in refused("init", "--random", "tiny", "-o", out, "--force", "--quiet")
    assert out.read_text() == "mine"


def test_a_replaced_checkpoint_is_whole(make_checkpoint: Make, cli: Cli, tmp_path: Path) -> None:
    """It is byte for byte the one that is made in a new folder: nothing of the old one is left, nor anything beside."""
    out = tmp_path / "out"
    assert cli("init", "--random", "tiny", "-o", out, "--shard-bytes", "300000", "--quiet").exit_code == 0
    result = cli("init", "--random", "tiny", "-o", out, "--kind", "ppf", "--force", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    nbytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert json.loads(result.stdout) == {"checkpoint": str(out), "preset": "tiny", "bytes": nbytes}
    assert digests(out) == digests(make_checkpoint("--kind", "ppf"))
    assert list(tmp_path.iterdir()) == [out]
    assert json.loads(cli("inspect", out, "--json").stdout)["kind"] == "ppf"


def test_a_checkpoint_whose_replacement_fails_stays(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert cli("init", "--random", "tiny", "-o", out, "--quiet").exit_code == 0
    before = digests(out)

    def fail(folder: Path, tokenizer: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(random, "write_tokenizer", fail)  # the last thing that is written
    result = cli("init", "--random", "tiny", "-o", out, "--seed", "1", "--force", "--quiet")
    assert result.exit_code != 0
    assert "no space left on device" in result.stderr
    assert digests(out) == before
    assert list(tmp_path.iterdir()) == [out]
