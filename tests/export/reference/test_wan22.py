"""Wan2.2: what diffusers' unmodified WanPipeline makes of the same folders: the residual VAE, and two networks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyrexport
import pytest
import torch
from click.testing import Result
from diffusers import WanPipeline
from pyrexport.export.weights.edits import read_tensor
from pyrexport.export.weights.lora import merge_loras, parse_lora
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import initial_latent
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.proof.metrics import distance, psnr
from safetensors.torch import save_file
from support.builders import resign

Make = Callable[..., Path]
Cli = Callable[..., Result]
Refused = Callable[..., str]

SMALL = {"height": 64, "width": 64, "num_frames": 17}
TWO = ("--random", "tiny-a14b", "--blocks", "1", "--no-vae", "--no-text-encoder")
GUIDED: dict[str, dict[str, float]] = {
    "tiny-ti2v": {"guidance_scale": 5.0},
    "tiny-a14b": {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
}


@pytest.fixture(scope="module", params=GUIDED)
def name(request: pytest.FixtureRequest) -> str:
    """Of a preset."""
    return str(request.param)


@pytest.fixture(scope="module")
def made(name: str, make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint as diffusers saves it, and a bundle of it."""
    checkpoint = make_checkpoint("--random", name)
    out = tmp_path_factory.mktemp(name) / "bundle"
    return checkpoint, pyrexport.build(checkpoint, out, resolution="17x64x64")


@pytest.mark.slow
def test_a_bundle_makes_the_latents_and_the_video_of_their_own_pipeline(name: str, made: tuple[Path, Path]) -> None:
    """Within 1e-4 and 60 dB, from the same initial latents, with the folder's UniPC."""
    checkpoint, bundle = made
    with pyrexport.load(bundle) as pipeline:
        how: dict[str, Any] = {"schedule": "8", "negative_prompt": "blurred", "seed": 4, **GUIDED[name]}
        found = pipeline("a red circle moving left", **how)
        run = plan(
            pipeline.model.pyramid,
            pipeline.bundle.manifest.resolution,
            pipeline.model.schedule("8", **GUIDED[name]),
        )
        assert {step.expert for step in run} == set(range(pipeline.model.experts))
        assert {step.guidance_scale for step in run} == set(GUIDED[name].values())
    theirs = WanPipeline.from_pretrained(str(checkpoint))
    assert theirs.config.expand_timesteps == (name == "tiny-ti2v")
    theirs.set_progress_bar_config(disable=True)
    given = {
        "prompt": "a red circle moving left",
        "negative_prompt": "blurred",
        "num_inference_steps": 8,
        "latents": torch.from_numpy(initial_latent(run, generator(4)))[None],
        "max_sequence_length": pipeline.model.text_length,
        **SMALL,
        **GUIDED[name],
    }
    latents = theirs(**given, output_type="latent").frames[0]
    assert distance(found.latents, np.asarray(latents)).relative_l2 <= 1e-4
    frames = (theirs(**given, output_type="np").frames[0] * 255).round().astype(np.uint8)
    assert found.frames is not None
    assert psnr(found.frames, frames) >= 60


@pytest.mark.slow
def test_parity(made: tuple[Path, Path], cli: Cli) -> None:
    checkpoint, bundle = made
    result = cli("parity", bundle, "--reference", checkpoint, "--schedule", "6", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert all(levels[level]["relative_l2"] <= 1e-5 for level in ("text", "stages", "vae"))


@pytest.mark.slow
def test_experts_that_changed_places_are_noticed(
    make_bundle: Make, make_checkpoint: Make, tmp_path: Path, cli: Cli
) -> None:
    bundle, checkpoint = tmp_path / "bundle", make_checkpoint(*TWO)
    shutil.copytree(make_bundle(*TWO), bundle)
    one, other = bundle / "stage0.onnx", bundle / "stage0_expert1.onnx"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    resign(bundle)
    result = cli("parity", bundle, "--reference", checkpoint, "--schedule", "6", "--json", "--quiet", "--bisect")
    assert result.exit_code == 1
    levels = json.loads(result.stdout)["levels"]
    assert not levels["stages"]["passed"]


def test_a_pyramid_has_the_experts_that_its_stages_need(make_bundle: Make) -> None:
    """Stages end at 0.94, 0.59 and 0, and the second network takes over at 0.875."""
    bundle = make_bundle(*TWO, "--kind", "pyramidal")
    names = {path.stem for path in bundle.glob("stage*.onnx")}
    assert names == {"stage2", "stage1", "stage1_expert1", "stage0_expert1"}


@pytest.mark.slow
def test_parity_of_a_pyramid_of_two_networks(make_bundle: Make, make_checkpoint: Make, cli: Cli) -> None:
    arguments = (*TWO, "--kind", "pyramidal")
    how = ("--schedule", "2-3-1", "--guidance-scale", 3, "--guidance-scale-2", 2, "--quiet")
    result = cli("parity", make_bundle(*arguments), "--reference", make_checkpoint(*arguments), *how)
    assert result.exit_code == 0, result.output


def test_inspect_says_both_networks(make_checkpoint: Make, make_bundle: Make, cli: Cli) -> None:
    checkpoint, bundle = make_checkpoint(*TWO), make_bundle(*TWO)
    said = json.loads(cli("inspect", checkpoint, "--json", "--quiet").stdout)
    assert said["components"]["transformer"] == said["components"]["transformer_2"]
    assert said["schedules"]["40"]["guidance_scale_2"] == 3.0
    stored = json.loads(cli("inspect", bundle, "--json", "--quiet").stdout)
    assert stored["parameters"] == 2 * said["components"]["transformer"]["parameters"]


def broken(source: Path, out: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint, changed."""
    shutil.copytree(source, out)
    change(out)
    return out


def no_second(folder: Path) -> None:
    shutil.rmtree(folder / "transformer_2")


def no_boundary(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["boundary_ratio"]
    (folder / "model_index.json").write_text(json.dumps(index))


def boundary_of_two(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 2}))


def another_size(folder: Path) -> None:
    config = json.loads((folder / "transformer_2" / "config.json").read_text())
    (folder / "transformer_2" / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))


def another_vae(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"is_residual": True}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_second, "expected the folder"),
        (no_boundary, "expected a boundary_ratio"),
        (boundary_of_two, "above 0 and below 1"),
        (another_size, "expected the configuration of"),
        (another_vae, "expected a VAE of residual, 4x16x16, found one of residual, 4x8x8"),
    ],
)
def test_refused(
    make_checkpoint: Make, tmp_path: Path, refused: Refused, change: Callable[[Path], None], words: str
) -> None:
    folder = broken(make_checkpoint("--random", "tiny-a14b"), tmp_path / "made", change)
    assert words in refused("inspect", folder)


def test_a_vae_that_does_not_say_its_statistics_is_refused(
    make_checkpoint: Make, tmp_path: Path, refused: Refused
) -> None:
    """Diffusers would take those of Wan2.1's sixteen channels."""
    folder = tmp_path / "made"
    shutil.copytree(make_checkpoint("--random", "tiny-ti2v"), folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["latents_mean"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    command = ("build", folder, "--target", "ort", "-o", tmp_path / "out", "--resolution", "17x64x64")
    assert "field 'latents_mean' is missing: expected 48 numbers" in refused(*command)


def test_a_second_guidance_scale_is_of_two_networks(make_bundle: Make, tmp_path: Path, refused: Refused) -> None:
    words = ("sample", make_bundle(), "--prompt", "a", "-o", tmp_path / "a.npy", "--guidance-scale-2", 3)
    assert "a model of two networks, which this one is not" in refused(*words)


@pytest.mark.parametrize("said_by", ["key", "option"])
def test_a_lora_of_the_second_network(make_checkpoint: Make, tmp_path: Path, said_by: str) -> None:
    opened = read_checkpoint(make_checkpoint("--random", "tiny-a14b"))
    torch.manual_seed(0)
    up, down, key = torch.randn(64, 2), torch.randn(2, 64), "blocks.0.attn1.to_q"
    prefix = "transformer_2." if said_by == "key" else "transformer."
    tensors = {f"{prefix}{key}.lora_B.weight": up, f"{prefix}{key}.lora_A.weight": down}
    save_file(tensors, tmp_path / "lora.safetensors")
    text = f"{tmp_path / 'lora.safetensors'}:0.5"
    merged = merge_loras(opened, [parse_lora(text if said_by == "key" else f"transformer_2={text}")])
    assert not any(entry.edits for entry in merged.transformer.values())
    edited = {name for name, entry in merged.transformer_2.items() if entry.edits}
    assert edited == {f"{key}.weight"}
    before, after = (read_tensor(found.transformer_2[f"{key}.weight"]) for found in (opened, merged))
    assert torch.allclose(after, before + 0.5 * up @ down, rtol=1e-6, atol=1e-6)


def test_a_lora_of_a_second_network_that_is_not_there(make_checkpoint: Make, tmp_path: Path) -> None:
    save_file({"transformer_2.blocks.0.attn1.to_q.diff_b": torch.ones(64)}, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="transformer_2"):
        merge_loras(read_checkpoint(make_checkpoint()), [parse_lora(str(tmp_path / "lora.safetensors"))])
