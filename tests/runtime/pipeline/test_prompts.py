"""Embeddings of prompts that are kept between runs."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyrexport
import pytest
from click.testing import Result
from pyrexport.runtime.files import cache_folder
from pyrexport.runtime.pipeline import prompts
from pyrexport.runtime.pipeline.prompts import PromptCache, encoder_hash
from support.building import ONE_STAGE

PROMPT = "a red circle"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyrexport" / "prompts"


def encoded(bundle: Path) -> tuple[np.ndarray, list[str], tuple[str, ...]]:
    """The prompt's embeddings, the graphs that ran for it, and what was said."""
    with pyrexport.load(bundle, cache_prompts=True) as pipeline:
        return pipeline.encode(PROMPT), list(pipeline.timings.engine), pipeline.encoder.cache_warnings


def test_a_prompt_is_encoded_once(bundle: Path, kept: Path) -> None:
    first, ran, said = encoded(bundle)
    again, ran_again, said_again = encoded(bundle)
    assert (ran, ran_again, said, said_again) == (["text_64"], [], (), ())
    assert np.array_equal(first, again)
    with pyrexport.load(bundle) as pipeline:
        assert np.array_equal(pipeline.encode(PROMPT), first)
        assert list(pipeline.timings.engine) == ["text_64"]


@pytest.mark.parametrize("damage", ["cut", "changed", "another's"])
def test_what_is_not_what_it_should_be_is_ignored_with_one_line(bundle: Path, kept: Path, damage: str) -> None:
    first, *_ = encoded(bundle)
    (file,) = kept.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-100]
    elif damage == "changed":
        data[-1] ^= 1
    else:
        other = PromptCache("0" * 64)
        other.put([1], np.zeros((64, 32), np.float32))
        data = bytearray(next(path for path in kept.iterdir() if path != file).read_bytes())
    file.write_bytes(data)
    found, ran, (line,) = encoded(bundle)
    assert np.array_equal(found, first)
    assert ran == ["text_64"]
    assert line == f"{file} is ignored: it is damaged, or another encoder's"
    assert encoded(bundle)[1:] == ([], ())  # what was encoded again is in its place


def test_a_cache_that_cannot_be_written_is_told_of_once(
    bundle: Path, tmp_path: Path, kept: Path, cli: Callable[..., Result]
) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_text("a file where the folder should be")
    sample = ("sample", bundle, "--prompt", PROMPT, "-o", tmp_path / "x.npy", "--schedule", "1-1-1", "--quiet")
    result = cli(*sample)
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert "embeddings of prompts are not kept" in result.stderr
    assert cli(*sample, "--no-cache").stderr == ""


def test_encoders_that_are_stored_otherwise_share_nothing(make_bundle: Callable[..., Path]) -> None:
    def of(*arguments: str, **options: str) -> str:
        return encoder_hash(pyrexport.load(make_bundle(*ONE_STAGE, *arguments, **options)).bundle.manifest)

    assert of() != of(precision="text_encoder=bf16")
    assert of() != of("--seed", "1")


def test_it_holds_no_more_than_it_may(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_BYTES", 20_000)
    cache, value = PromptCache("e" * 64), np.zeros((64, 32), np.float32)
    for number in range(4):
        cache.put([number], value)
        (newest,) = (path for path in kept.iterdir() if path == cache._file([number]))
        os.utime(newest, (number, number))
    assert sum(path.stat().st_size for path in kept.iterdir()) <= 20_000
    assert [cache.get([number], value.shape) is not None for number in range(4)] == [False, False, True, True]


def test_a_cache_folder_that_is_relative_is_not_made_in_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("/home/somebody/.cache/pyrexport")
