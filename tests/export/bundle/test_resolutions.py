"""Bundles that sample at several resolutions: each graph fixed in shape, and everything else there once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pyrexport import load
from pyrexport.export.bundle.options import BuildRequest, resolve_options
from pyrexport.export.bundle.tiling import choose_tiles
from pyrexport.runtime.bundle.graphs import decoder_key, graph_specs, stage_key
from pyrexport.runtime.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE, signed
from pyrexport.runtime.bundle.tiles import Tiles
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.targets.facts import find_build_target
from support.building import LEAN, small_checkpoint

SQUARE, WIDE, LONG = "17x64x64", "17x64x128", "33x64x64"


def asked(*resolutions: str) -> tuple[str, ...]:
    return tuple(word for resolution in resolutions for word in ("--resolution", resolution))


@pytest.fixture(scope="module")
def several(shared, tiny) -> Path:
    """A bundle of all three. Not to be changed: copy it."""
    from conftest import build

    return shared(["several"], lambda out: build(tiny, out, *asked(SQUARE, WIDE, LONG)))


def test_weights_and_shared_graphs_are_there_once(several, bundle):
    """What is added is the stages of each, and the decoder of frames of another size."""
    more = {path.name for path in several.iterdir()} - {path.name for path in bundle.iterdir()}
    stages = {f"stage{index}_{size}.onnx" for index in range(3) for size in (WIDE, LONG)}
    assert more == stages | {f"vae_{which}_{WIDE}.onnx" for which in ("first", "next")}
    for file in (WEIGHTS_FILE, "stage0.onnx", "stage2.onnx", "vae_next.onnx"):
        assert (several / file).read_bytes() == (bundle / file).read_bytes()


@pytest.mark.parametrize("resolution", [WIDE, LONG])
def test_each_is_as_its_reference(several, tiny, cli, resolution):
    how = ("--resolution", resolution, "--prompt", "a cat", "--schedule", "1-1-1", "--json", "--quiet")
    result = cli("parity", several, "--reference", tiny, *how)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resolution"] == resolution


def test_samples_have_the_size_that_was_asked_for(several, cli, tmp_path):
    frames = {}
    for size in (None, WIDE, LONG):
        with load(several, resolution=size) as pipeline:
            frames[size] = pipeline("a cat", schedule="1-1-1").frames.shape
    assert frames == {None: (17, 64, 64, 3), WIDE: (17, 64, 128, 3), LONG: (33, 64, 64, 3)}
    out = tmp_path / "latents.npy"
    common = ("--prompt", "a cat", "--schedule", "1-1-1", "--quiet")
    assert cli("sample", several, "--resolution", LONG, "-o", out, *common).exit_code == 0
    assert np.load(out).shape == (16, 9, 8, 8)
    result = cli("decode", several, out, "-o", tmp_path / "cat.npz", "--quiet")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "cat.npz")["frames"].shape == (33, 64, 64, 3)


def test_a_trace_says_its_resolution_and_results_are_kept_by_it(several, tiny, cli, tmp_path):
    copy, trace = tmp_path / "bundle", tmp_path / "trace.safetensors"
    shutil.copytree(several, copy)
    recording = ("--record", trace, "--resolution", WIDE, "--prompt", "a cat", "--schedule", "1-1-1", "--quiet")
    assert cli("parity", "--reference", tiny, *recording).exit_code == 0
    assert cli("parity", copy, "--trace", trace, "--store", "--quiet").exit_code == 0
    assert cli("quality", copy, "--trace", trace, "--quiet").exit_code == 0
    document = json.loads(cli("inspect", copy, "--json", "--quiet").stdout)
    found = {size["resolution"]: size["parity"] and size["parity"]["passed"] for size in document["resolutions"]}
    assert found == {SQUARE: None, WIDE: True, LONG: None}
    tokens = [size["tokens"][0] for size in document["resolutions"]]
    assert tokens == [5 * 4 * 4, 5 * 4 * 8, 9 * 4 * 4]
    document = json.loads(cli("inspect", copy, "--resolution", WIDE, "--json", "--quiet").stdout)
    assert document["stages"][0]["latent"] == [16, 5, 8, 16]
    assert document["parity"]["passed"]


def test_what_a_bundle_does_not_sample_at_is_refused(several, tiny, refused, tmp_path):
    out = tmp_path / "out"
    line = refused("sample", several, "--resolution", "17x128x128", "--prompt", "a cat", "-o", out)
    assert f"samples at {SQUARE}, {WIDE}, {LONG}, found 17x128x128" in line
    assert "samples at" in refused("parity", several, "--reference", tiny, "--resolution", "17x128x128")
    assert "samples at" in refused("bench", several, "--resolution", "17x128x128")
    build = ("build", tiny, "--target", "ort", "-o", out)
    assert f"{SQUARE} is given twice" in refused(*build, *asked(SQUARE, WIDE, SQUARE))
    assert "nearest: 64" in refused(*build, *asked(SQUARE, "17x60x64"))
    assert "larger than the frame's 8x8" in refused(*build, *asked(WIDE, SQUARE), "--vae-tile", "8x16")
    assert not list(tmp_path.iterdir())


def test_frames_that_are_cut_alike_share_a_decoder(tiny):
    checkpoint, sizes = small_checkpoint(tiny), (Resolution.parse(SQUARE), Resolution.parse(WIDE))
    request = BuildRequest(vae_tile="6x8", resolutions=sizes)
    decoders = resolve_options(checkpoint, find_build_target("ort"), request).decoders_of(checkpoint, packed=False)
    assert [decoder.tiles.count for (decoder,) in decoders.values()] == [2, 2 * 3]
    square, wide = graph_specs(checkpoint.model, decoders).values()
    for first in (True, False):
        assert square[decoder_key("vae", first=first)] == wide[decoder_key("vae", first=first)]
    assert wide[stage_key(0)].name == f"stage0_{WIDE}"


def test_frames_that_are_too_large_share_the_tile_that_costs_least(make_checkpoint):
    """Portrait and landscape, so large that the tiny decoder must cut them."""
    checkpoint = small_checkpoint(make_checkpoint("--no-text-encoder"))
    frames = [(560, 1040), (1040, 560)]
    *large, small = choose_tiles(checkpoint, [*frames, (8, 8)])
    assert small is None
    assert large[0] == large[1]
    assert large[0] is not None
    shared = sum(Tiles(frame, large[0]).overhead for frame in frames)
    alone = [choose_tiles(checkpoint, [frame])[0] for frame in frames]
    assert shared <= min(sum(Tiles(frame, tile).overhead for frame in frames) for tile in alone)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d["resolutions"].append(SQUARE), "each once"),
        (lambda d: d["resolutions"].append("17x128x128"), "'17x128x128' is missing"),
        (lambda d: d["resolutions"].append("17x65x64"), "17x65x64"),
        (lambda d: d["resolutions"].remove(LONG), f"unknown field '{LONG}'"),
        (lambda d: d["graphs"].pop(f"stage1_{WIDE}"), f"graph 'stage1_{WIDE}' is missing"),
        (lambda d: d["parity"].update({"17x128x128": {"passed": True, "levels": {}}}), "unknown field '17x128x128'"),
        (lambda d: d["decoders"]["vae"]["frames"][WIDE].update(tile=[8, 17]), "at most 8 and 16"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(several, refused, tmp_path, change, line):
    """Past its hash."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in several.iterdir():
        (copy / file.name).symlink_to(file)
    document = json.loads((several / MANIFEST_FILE).read_text())
    change(document)
    (copy / MANIFEST_FILE).unlink()
    (copy / MANIFEST_FILE).write_text(json.dumps(signed(document)))
    assert line in refused("inspect", copy)


@pytest.mark.slow
def test_a_program_of_executorch_has_a_method_for_each(make_checkpoint, cli, tmp_path):
    """One file, each weight once: what is added is operators. It takes half a minute."""
    pytest.importorskip("executorch")
    checkpoint, bundle = make_checkpoint(*LEAN, "--blocks", "1", "--stages", "1"), tmp_path / "bundle"
    build = ("build", checkpoint, "--target", "executorch", "-o", bundle, "--quiet")
    result = cli(*build, *asked(SQUARE, "17x32x64"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in bundle.iterdir()} == {MANIFEST_FILE, "stages.pte"}
    weights = sum(entry.elements for entry in read_checkpoint(checkpoint).transformer.values()) * 4
    assert (bundle / "stages.pte").stat().st_size < weights + 2 * 80_000
    result = cli("parity", bundle, "--reference", checkpoint, "--resolution", "17x32x64", "--quiet")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_an_engine_of_tensorrt_has_a_profile_for_each(make_checkpoint, cli, tmp_path):
    """It is one network, made again for its parity at each. It takes half a minute."""
    pytest.importorskip("tensorrt_rtx")
    checkpoint, bundle = make_checkpoint(*LEAN, "--blocks", "1"), tmp_path / "bundle"
    build = ("build", checkpoint, "--target", "trt", "--compute-capability", "8.9", "-o", bundle, "--quiet")
    result = cli(*build, *asked(SQUARE, "33x64x128"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in bundle.iterdir()} == {MANIFEST_FILE, "stages.engine"}
    how = ("--graph", "--reference", checkpoint, "--resolution", "33x64x128", "--schedule", "1-1-1", "--quiet")
    result = cli("parity", bundle, *how)
    assert result.exit_code == 0, result.output
