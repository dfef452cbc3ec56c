"""Tiled decoding: where tiles lie, how they blend, and bundles that decode so."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyrexport
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from pyrexport.runtime.bundle.tiles import SMALLEST_TILE, Tiles, decode_tiled
from pyrexport.runtime.proof.metrics import psnr
from show_tiles import decode_both

sizes = st.integers(SMALLEST_TILE, 60)


@given(sizes, sizes, sizes, sizes, st.sampled_from([8, 16]))
def test_tiles_cover_the_frame_and_their_weights_sum_to_one(h: int, w: int, tile_h: int, tile_w: int, n: int) -> None:
    """It holds at every pixel, whatever the sizes, and neighbours overlap by a quarter at least."""
    tiles = Tiles((h, w), (min(tile_h, h), min(tile_w, w)), n)
    total = np.zeros((n * h, n * w))
    for rows, columns, weight in tiles.places():
        assert weight.min() > 0
        total[n * rows.start : n * rows.stop, n * columns.start : n * columns.stop] += weight
    assert np.allclose(total, 1, atol=1e-5)
    for starts, tile in ((tiles.rows, tiles.tile[0]), (tiles.columns, tiles.tile[1])):
        assert all(b - a <= tile - tile // 4 for a, b in pairwise(starts))


def test_the_papers_frame_in_tiles_of_32() -> None:
    """They are eight, at 1.41 of the frame's cost, as measured for 448x832."""
    tiles = Tiles((56, 104), (32, 32))
    assert (tiles.rows, tiles.columns) == ((0, 24), (0, 24, 48, 72))
    assert tiles.overhead == pytest.approx(1.41, abs=0.005)


def test_a_decoder_without_a_view_beyond_a_pixel_is_tiled_exactly() -> None:
    """Frames of a per-pixel decoder come out as if decoded whole, a few at a time, and only with the last tile."""
    latent = np.random.default_rng(0).standard_normal((16, 3, 13, 20)).astype(np.float32)
    calls = []

    def decode(tile: np.ndarray) -> Iterator[np.ndarray]:
        calls.append(tile.shape)
        for index in range(tile.shape[1]):
            yield np.repeat(np.repeat(tile[None, :3, index], 8, 2), 8, 3)

    tiles = Tiles((13, 20), (8, 9))
    tiled = decode_tiled(tiles, latent, decode)
    first = next(tiled)
    assert len(calls) == tiles.count > 1
    whole = np.concatenate(list(decode(latent)))
    assert np.allclose(np.concatenate([first, *tiled]), whole, atol=1e-5)


def test_a_tiled_bundle_samples_and_passes_parity(
    make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    """A frame of 8x16 latents in tiles of 6x8, with caches in 16 bits, is exact on a tile."""
    checkpoint, out = make_checkpoint("--stages", "1"), tmp_path / "tiled"
    options = ("--resolution", "17x64x128", "--vae-tile", "6x8", "--vae-caches", "fp16", "--quiet")
    assert cli("build", checkpoint, "--target", "ort", "-o", out, *options).exit_code == 0
    vae = json.loads(cli("inspect", out, "--json").output)["decoders"]["vae"]
    assert vae == {"tile": [6, 8], "tiles": 6, "overhead": 2.25, "caches": "float16"}
    assert "6 tiles of 6x8" in cli("inspect", out).output
    result = cli("parity", out, "--reference", checkpoint, "--json", "--quiet", "--prompt", "x")
    levels = json.loads(result.stdout)["levels"]
    # Random weights look far beyond tiles this small: the video is another, the decoder's graphs are not.
    assert all(level["passed"] for name, level in levels.items() if name != "video")
    assert levels["vae"]["relative_l2"] > 1e-5  # the caches are rounded
    trace = tmp_path / "trace.safetensors"
    record = ("parity", "--record", trace, "--reference", checkpoint, "--prompt", "x", "--no-decode", "--quiet")
    with pyrexport.load(out) as pipeline:
        assert pipeline("x").frames.shape == (17, 64, 128, 3)
    # At the checkpoint's own resolution a trace is of another model: the bundle says so before anything runs.
    assert cli(*record).exit_code == 0
    assert cli("parity", out, "--trace", trace).exit_code == 2


@pytest.mark.slow
def test_a_trained_decoder_shows_no_seam(tmp_path: Path) -> None:
    """Two shapes side by side on 128x256 pixels, in 3 tiles of 16x16 latents, have 35 dB beside untiled; 40 s."""
    whole, tiled = decode_both(tmp_path)
    assert psnr(tiled, whole) >= 35
    assert not np.array_equal(tiled, whole)


@pytest.mark.parametrize(("tile", "words"), [("8", "HEIGHTxWIDTH"), ("3x8", "at least 4"), ("8x99", "larger than")])
def test_impossible_tiles_are_refused(
    tiny: Path, refused: Callable[..., str], tmp_path: Path, tile: str, words: str
) -> None:
    """They are refused before anything is written."""
    assert words in refused("build", tiny, "--target", "ort", "-o", tmp_path / "out", "--vae-tile", tile)
    assert not list(tmp_path.iterdir())
