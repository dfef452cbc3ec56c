"""A tiny decoder beside a VAE, and in its place: read, built, decoded with, shown by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pyrexport
import pytest
import torch
from click.testing import Result
from pyrexport.export.families.tiny_decoder import TinyDecoder
from pyrexport.export.weights.pickled import read_any_header
from pyrexport.runtime.model.checkpoint import Files, read_checkpoint
from pyrexport.runtime.model.families import TinyDecoderConfig
from support.builders import resign
from support.tiny_decoders import WIDTHS, write_tiny_decoder
from torch.nn.functional import conv2d, interpolate

Cli = Callable[..., Result]
SMALL = ("--resolution", "17x64x64", "--quiet")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny") / "taew2_1.pth")


@pytest.fixture(scope="module")
def both(shared, make_checkpoint, weights):
    """A bundle with both decoders, of one stage."""

    def write(out: Path) -> None:
        pyrexport.build(make_checkpoint("--stages", "1"), out, resolution="17x64x64", files={"tiny_decoder": weights})

    return shared(["both decoders"], write)


def by_the_facts(tensors: dict[str, torch.Tensor], latent: torch.Tensor) -> torch.Tensor:
    """Frames [n, 3, H, W] in 0 … 1 of a latent [T, C, h, w], layer by layer, a frame after the other."""
    memories: dict[str, torch.Tensor] = {}

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = tensors[f"{name}.weight"]
        return conv2d(x, weight, tensors.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def memory(name: str, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x, memories.get(name, torch.zeros_like(x))], 1)
        memories[name] = x
        for index in (0, 2):
            y = conv(f"{name}.conv.{index}", y).relu()
        return (conv(f"{name}.conv.4", y) + x).relu()

    def walk(x: torch.Tensor, place: int, growths: tuple[int, ...]) -> list[torch.Tensor]:
        if not growths:
            return [conv("decoder.22", x.relu())]
        for block in range(place, place + 3):
            x = memory(f"decoder.{block}", x)
        x = interpolate(x, scale_factor=2)
        grown = conv2d(x, tensors[f"decoder.{place + 4}.conv.weight"][-growths[0] * x.shape[1] :])
        parts = grown.split(x.shape[1], 1)
        return [y for part in parts for y in walk(conv(f"decoder.{place + 5}", part), place + 6, growths[1:])]

    frames = [frame for x in latent for frame in walk(conv("decoder.1", (x[None] / 3).tanh() * 3).relu(), 3, (1, 2, 2))]
    return torch.cat(frames)[3:].clamp(0, 1)


def test_the_reference_computes_what_the_facts_say(weights: Path, tiny: Path) -> None:
    """In float64, where nothing but another formula makes a difference."""
    tensors = {name: value.double() for name, value in torch.load(weights, weights_only=True).items()}
    latent = torch.randn(3, 16, 4, 6, dtype=torch.float64)
    entries = read_checkpoint(tiny, files=Files(tiny_decoder=weights), header=read_any_header).tiny_decoder
    decoder = TinyDecoder(TinyDecoderConfig(widths=WIDTHS)).double()
    decoder.load_state_dict({name: tensors[name][-entries[name].shape[0] :] for name in entries})
    with torch.no_grad():
        found = decoder(latent)
    expected = by_the_facts(tensors, latent)
    assert found.shape == (9, 3, 32, 48)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_bundle_decodes_by_either_and_proves_both(
    both: Path, make_checkpoint, weights: Path, cli: Cli, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("--stages", "1")
    given = ("--reference", checkpoint, "--vae-decoder", weights, "--prompt", "x", "--json", "--quiet")
    result = cli("parity", both, *given, "--decoder", "tiny")
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert levels["vae"]["relative_l2"] <= 1e-5
    assert levels["tiny_decoder"]["relative_l2"] <= 1e-5
    assert levels["video"]["psnr"] >= 60
    inspected = json.loads(cli("inspect", both, "--json", "--quiet").stdout)
    assert set(inspected["decoders"]) == {"vae", "tiny_decoder"}
    assert "frames decoded by the full decoder or by the tiny decoder" in " ".join(cli("inspect", both).output.split())
    sample = ("sample", both, "--prompt", "x", "--quiet", "-o")
    for name in ("full", "tiny"):
        assert cli(*sample, tmp_path / f"{name}.npz", "--decoder", name).exit_code == 0
    frames = [np.load(tmp_path / f"{name}.npz")["frames"] for name in ("full", "tiny")]
    assert frames[0].shape == frames[1].shape == (17, 64, 64, 3)
    assert not np.array_equal(*frames)
    timed = json.loads(cli("bench", both, "--runs", "1", "--json", "--quiet").stdout)["graphs"]
    assert timed["tiny_next"]["calls"] == timed["vae_next"]["calls"] == 4


def test_a_wrong_weight_of_it_fails_its_own_level(both: Path, make_checkpoint, cli: Cli, tmp_path: Path) -> None:
    def off(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.16.conv.2.weight"] *= 1.001

    other = write_tiny_decoder(tmp_path / "other.safetensors", off)
    given = ("--reference", make_checkpoint("--stages", "1"), "--vae-decoder", other, "--prompt", "x", "--json")
    result = cli("parity", both, *given, "--quiet", "--no-decode")
    assert result.exit_code == 1
    levels = json.loads(result.stdout)["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["tiny_decoder"]


def test_caches_that_are_exchanged_fail_its_own_level(
    both: Path, make_checkpoint, weights: Path, cli: Cli, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(both, tmp_path / "bundle"))
    graph = onnx.load(bundle / "tiny_next.onnx", load_external_data=False)
    exchanged = {"cache_0": "cache_1", "cache_1": "cache_0"}
    for node in graph.graph.node:
        node.input[:] = [exchanged.get(name, name) for name in node.input]
    onnx.save(graph, bundle / "tiny_next.onnx")
    resign(bundle)
    given = ("--reference", make_checkpoint("--stages", "1"), "--vae-decoder", weights, "--prompt", "x", "--json")
    result = cli("parity", bundle, *given, "--quiet", "--no-decode")
    assert result.exit_code == 1
    levels = json.loads(result.stdout)["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["tiny_decoder"]


def test_previews_are_decoded_after_each_stage(make_checkpoint, weights: Path, tmp_path: Path) -> None:
    """In a bundle that has the tiny decoder alone, a coarser stage's latent is enlarged for it."""
    out, shown = tmp_path / "bundle", list[np.ndarray]()
    given = {"files": {"tiny_decoder": weights}, "decoder": "tiny", "resolution": "17x64x64"}
    pyrexport.build(make_checkpoint("--stages", "2", "--no-text-encoder"), out, **given)
    with pyrexport.load(out) as pipeline:
        assert set(pipeline.model.decoders) == {"tiny_decoder"}
        text = np.zeros((pipeline.model.text_length, pipeline.model.transformer.text_dim), np.float32)
        sample = pipeline(prompt_embeds=text, schedule="2-1", preview=shown.append, preview_decoder="tiny")
    assert [frames.shape for frames in shown] == [(1, 64, 64, 3)] * 2
    assert 0 < sample.timings.preview < sample.timings.denoise
    # After the last step of all, x0 is the latent itself, and its first frame is the video's.
    assert np.array_equal(shown[-1][0], sample.frames[0])


def test_a_checkpoint_may_have_it_in_a_folder_of_its_own(tiny: Path, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    (folder / "tiny_decoder").mkdir()
    write_tiny_decoder(folder / "tiny_decoder" / "diffusion_pytorch_model.safetensors")
    assert set(read_checkpoint(folder).model.decoders) == {"vae", "tiny_decoder"}


def test_one_of_wan22s_latents_makes_patches_of_pixels(make_checkpoint, cli: Cli, tmp_path: Path) -> None:
    """Their latents have 48 channels, and each pixel of the last convolution is 2x2 of the video."""
    checkpoint, out = make_checkpoint("--random", "tiny-ti2v", "--no-text-encoder"), tmp_path / "bundle"
    weights = write_tiny_decoder(tmp_path / "taew2_2.safetensors", channels=48, patch_size=2)
    sizes = ("--resolution", "5x64x64", "--quiet")
    given = ("--vae-decoder", weights, "--decoder", "tiny")
    assert cli("build", checkpoint, "--target", "ort", "-o", out, *given, *sizes).exit_code == 0
    how = ("--reference", checkpoint, *given, "--prompt", "x", "--schedule", "1", "--json", "--quiet")
    result = cli("parity", out, *how)
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert levels["tiny_decoder"]["relative_l2"] <= 1e-5
    assert levels["video"]["psnr"] >= 60


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop("decoder.22.weight"), "'decoder.22.weight' is a convolution's, found none"),
        (lambda t: t.pop("decoder.9.conv.2.bias"), "tensor 'decoder.9.conv.2.bias' is missing"),
        (lambda t: t.update({"decoder.22.weight": t["decoder.22.weight"][:2].clone()}), "three colours of each pixel"),
        (lambda t: t.update({"decoder.1.weight": t["decoder.1.weight"][:, :8].clone()}), "of 16 channels, 4x8x8"),
    ],
)
def test_files_that_are_no_tiny_decoder_are_refused(tiny, refused, tmp_path, change, line):
    file = write_tiny_decoder(tmp_path / "file.safetensors", change)
    assert line in refused("build", tiny, "--target", "ort", "-o", tmp_path / "out", "--vae-decoder", file, *SMALL)
    assert not (tmp_path / "out").exists()


def test_what_a_pickle_holds_beside_tensors_is_refused(tiny, refused, tmp_path):
    class Hook:
        def __reduce__(self):
            return print, ("executed",)

    file = tmp_path / "taew2_1.pth"
    torch.save({"decoder.1.weight": Hook()}, file)
    line = refused("build", tiny, "--target", "ort", "-o", tmp_path / "out", "--vae-decoder", file, *SMALL)
    assert "it is not opened" in line


@pytest.mark.parametrize(
    ("decoder", "options", "line"),
    [
        ("full", ("--precision", "tiny_decoder=fp16"), "the tiny_decoder out"),
        ("tiny", ("--quantize", "vae=w8a8"), "the vae out"),
        ("tiny", ("--vae-tile", "8x8"), "the VAE out: a tile or caches of it say nothing"),
        ("tiny", ("--vae-caches", "fp16"), "the VAE out: a tile or caches of it say nothing"),
    ],
)
def test_what_is_asked_of_a_decoder_that_is_left_out_is_refused(
    tiny, weights, refused, tmp_path, decoder, options, line
):
    given = ("--vae-decoder", weights, "--decoder", decoder, *options)
    found = refused("build", tiny, "--target", "ort", "-o", tmp_path / "out", *given, *SMALL)
    assert f"--decoder leaves {line}" in found


def test_a_decoder_that_is_not_there_is_refused(tiny, bundle, both, make_checkpoint, refused, tmp_path):
    source, out = make_checkpoint("--stages", "1"), tmp_path / "out.npz"
    assert "no tiny decoder to be built" in refused(
        "build", tiny, "--target", "ort", "-o", tmp_path / "out", "--decoder", "tiny", *SMALL
    )
    assert "decodes by full" in refused("sample", bundle, "--prompt", "x", "-o", out, "--decoder", "tiny", "--quiet")
    assert "has no tiny decoder" in refused("sample", tiny, "--prompt", "x", "-o", out, "--decoder", "tiny", "--quiet")
    assert "--vae-decoder" in refused("parity", both, "--reference", source, "--prompt", "x", "--quiet")
    folder = ("--vae-decoder", tmp_path)
    assert "is no file: expected a file that holds the tiny_decoder" in refused("inspect", tiny, *folder, "--quiet")
    preview = ("--preview", tmp_path / "p.png", "--preview-decoder", "tiny")
    assert "no tiny decoder" in refused("sample", bundle, "--prompt", "x", "-o", out, *preview, "--quiet")
    latents = ("sample", both, "--prompt", "x", "-o", tmp_path / "x.npy", "--decoder", "tiny", "--quiet")
    assert "'x.npy' holds latents, which nothing decodes: leave out --decoder" in refused(*latents)
    assert "is for --preview" in refused("sample", bundle, "--prompt", "x", "-o", out, *preview[2:], "--quiet")
