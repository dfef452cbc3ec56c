"""Helios' bundles against diffusers' own `HeliosPyramidPipeline`, unmodified and fed with the same noise."""

import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyrexport
import pytest
import torch
from click.testing import Result
from diffusers import HeliosPyramidPipeline, HeliosTransformer3DModel
from pyrexport.cli import main
from pyrexport.export.bundle.blueprint import Blueprint, draw
from pyrexport.export.bundle.options import BuildRequest, resolve_options
from pyrexport.export.lowering.onnx import export_onnx
from pyrexport.export.reference.record import record_trace
from pyrexport.export.reference.reference import Reference
from pyrexport.export.weights.edits import read_tensor
from pyrexport.export.weights.lora import merge_loras, parse_lora
from pyrexport.export.weights.source import sources_of
from pyrexport.runtime.chain import sampler
from pyrexport.runtime.chain.clock import Clock
from pyrexport.runtime.chain.history import History
from pyrexport.runtime.chain.plan import plan, single_step
from pyrexport.runtime.chain.pyramid import Pyramid, Resolution
from pyrexport.runtime.documents import read_json
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.runtime.model.families.helios import HELIOS, HeliosConfig
from pyrexport.runtime.pipeline.features import timestep_features
from pyrexport.runtime.proof.metrics import distance, psnr
from pyrexport.targets.facts import find_build_target
from safetensors.torch import load_file, save_file
from support.building import build_options
from support.parity import parity

SIZE = Resolution(9, 64, 128)
LATENT = (16, 3, 8, 16)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LEAN = ("--random", "tiny-helios-distilled", "--no-text-encoder", "--no-vae")


class Noise:
    """The format's noise, as `pyrexport.runtime.chain.noise` says it, drawn here by itself."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chunk = seed, 0

    def draw(self, *shape: int) -> np.ndarray:
        return self.stream.standard_normal(shape, dtype=np.float32)

    def prepare_latents(self, *sizes: Any, **how: Any) -> torch.Tensor:
        """What is halved bilinearly twice, times two each, to the first draw."""
        self.stream = np.random.Generator(np.random.Philox(self.seed).jumped(self.chunk))
        if self.chunk == 0:
            self.stream = np.random.Generator(np.random.Philox(self.seed))
        self.chunk += 1
        coarse = self.draw(LATENT[0], LATENT[1], LATENT[2] // 4, LATENT[3] // 4)
        return torch.from_numpy(np.kron(coarse, np.full((1, 1, 4, 4), 0.25, np.float32)))[None]

    def sample_block_noise(self, batch: int, c: int, t: int, h: int, w: int, *rest: Any) -> torch.Tensor:
        """Haar's high bands alone: covariance 1 on the diagonal of a block, -1/3 off it."""
        out = np.zeros((c, t, h, w), np.float32)
        for pattern in ([[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]):  # bands W, H, and both
            out += np.kron(self.draw(c, t, h // 2, w // 2), np.array(pattern, np.float32) / 2)
        return torch.from_numpy(out * np.float32(2 / math.sqrt(3)))[None]


def by_diffusers(checkpoint: Path, seed: int, output: str, lora: Path | None = None, **how: Any) -> np.ndarray:
    """Two chunks by the pipeline as its users load it: latents [C, T, H, W], or frames [T, H, W, 3]."""
    pipeline = HeliosPyramidPipeline.from_pretrained(checkpoint)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="style")
        pipeline.set_adapters("style", 0.5)
    pipeline.set_progress_bar_config(disable=True)
    noise = Noise(seed)
    pipeline.prepare_latents, pipeline.sample_block_noise = noise.prepare_latents, noise.sample_block_noise
    size = {"height": SIZE.height, "width": SIZE.width, "num_frames": 2 * SIZE.frames, "num_latent_frames_per_chunk": 3}
    steps = {"pyramid_num_inference_steps_list": [3, 2, 2]}
    guidance = {"guidance_scale": 1.0 if pipeline.config.is_distilled else 5.0}
    how = {**size, **steps, **guidance, **how}
    return pipeline("a cat", negative_prompt="", output_type=output, **how).frames[0]


def changed(checkpoint: Path, folder: Path, file: str, **fields: object) -> Path:
    """A copy of a checkpoint with other fields in one of its documents."""
    shutil.copytree(checkpoint, folder)
    document = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(document))
    return folder


def with_lora(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """A checkpoint with half of a random LoRA, which is written to the file in diffusers' names."""
    random, tensors = torch.Generator().manual_seed(5), {}
    for layer in ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "patch_short"):
        out, into, *kernel = checkpoint.transformer[f"{layer}.weight"].shape
        shapes = {"A": (4, into, *kernel), "B": (out, 4, *(1 for _ in kernel))}
        for half, shape in shapes.items():
            tensors[f"transformer.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=random) * 0.1
    save_file(tensors, file)
    return merge_loras(checkpoint, [parse_lora(f"{file}:0.5")])


def amplified(checkpoint: Path, folder: Path, mode: str) -> Path:
    """A copy of a checkpoint whose history has keys with scales of their own."""
    changed(checkpoint, folder, "transformer/config.json", is_amplify_history=True, history_scale_mode=mode)
    config, file = HELIOS.read_transformer(read_json(folder / "transformer" / "config.json"), ""), folder / WEIGHTS
    random, scales = torch.Generator().manual_seed(4), config.num_attention_heads if mode == "per_head" else 1
    names = [f"blocks.{index}.attn1.history_key_scale" for index in range(config.num_layers)]
    save_file(load_file(file) | {name: torch.randn(scales, generator=random) for name in names}, file)
    return folder


@pytest.fixture(scope="module")
def bundle_of(shared: Any) -> Callable[[Path], Path]:
    """A bundle of a checkpoint for ONNX Runtime. Not to be changed."""

    def get(checkpoint: Path, *options: str) -> Path:
        def write(out: Path) -> None:
            command = ["build", checkpoint, "--target", "ort", "--resolution", SIZE, "-o", out, "--quiet", *options]
            main([str(word) for word in command], standalone_mode=False)

        return shared(("helios", str(checkpoint), *options), write)

    return get


def test_two_chunks_of_a_bundle_are_the_pipelines(
    make_checkpoint: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    """From the prompt to the frames, the first chunk amplified."""
    checkpoint = make_checkpoint("--random", "tiny-helios-distilled")
    with pyrexport.load(bundle_of(checkpoint), resident=True) as pipeline:
        ours = pipeline("a cat", schedule="3-2-2", seed=3, chunks=2)
    latents = by_diffusers(checkpoint, 3, "latent", is_amplify_first_chunk=True).numpy()
    # Of two engines that sum in another order; seen: 3e-7.
    assert distance(ours.latents, latents).relative_l2 <= 1e-4
    frames = by_diffusers(checkpoint, 3, "np", is_amplify_first_chunk=True)
    assert ours.frames is not None
    assert ours.frames.shape == (17, 64, 128, 3)
    assert psnr(ours.frames, np.asarray((frames * 255).round(), np.uint8)) >= 60


def chain_in_numpy(checkpoint: Checkpoint, steps: str, scale: float) -> np.ndarray:
    """The latents of two chunks by the runtime's chain, with PyTorch's transformer in the engine's place."""
    model, reference = checkpoint.model, Reference(checkpoint)
    taken, text = plan(model.pyramid, SIZE, model.schedule(steps, scale), 2), reference.encode(["a cat", ""])
    how = {"negative": {"text": text[1]}, "seed": 3, "history": HELIOS.history}
    return sampler.sample(taken, model.pyramid.taps, reference, {"text": text[0]}, **how)


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_the_chain_of_mid_is_the_pipelines(
    scheduler: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """CFG-Zero*, two steps of zero velocity, a history."""
    mid, file = make_checkpoint("--random", "tiny-helios"), "scheduler/scheduler_config.json"
    folder = changed(mid, tmp_path / "checkpoint", file, scheduler_type=scheduler)
    assert read_checkpoint(folder, resolution=SIZE).model.schedule("3-2-2").solver.name == scheduler
    # Of float32 coefficients, and a sum of float64; seen: 2e-6.
    ours = chain_in_numpy(read_checkpoint(folder, resolution=SIZE), "3-2-2", 5.0)
    assert distance(ours, by_diffusers(folder, 3, "latent").numpy()).relative_l2 <= 1e-4


def test_a_distilled_index_says_how_to_guide_too(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Nobody guides a distilled model unless it is asked for; its pipeline does it as the index says then."""
    distilled = make_checkpoint("--random", "tiny-helios-distilled")
    folder = changed(distilled, tmp_path / "checkpoint", "model_index.json", is_cfg_zero_star=True)
    theirs = by_diffusers(folder, 3, "latent", is_amplify_first_chunk=True, guidance_scale=5.0).numpy()
    # See above.
    ours = chain_in_numpy(read_checkpoint(folder, resolution=SIZE), "3-2-2", 5.0)
    assert distance(ours, theirs).relative_l2 <= 1e-4


def test_a_configuration_has_fields_that_diffusers_knows() -> None:
    known = inspect.signature(HeliosTransformer3DModel.__init__).parameters
    assert HeliosConfig().to_json().keys() - {"_class_name"} <= known.keys()


def test_a_lora_changes_a_run_as_the_pipelines_own_does(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file, distilled = tmp_path / "style.safetensors", make_checkpoint("--random", "tiny-helios-distilled")
    styled = with_lora(read_checkpoint(distilled, resolution=SIZE), file)
    # See above; seen: 2e-7, and 1e-2 without the LoRA.
    theirs = by_diffusers(distilled, 3, "latent", lora=file, is_amplify_first_chunk=True).numpy()
    assert distance(chain_in_numpy(styled, "3-2-2", 1.0), theirs).relative_l2 <= 1e-4


def test_the_reference_is_that_pipeline_where_a_run_is_its_own(make_checkpoint: Callable[..., Path]) -> None:
    for preset in ("tiny-helios-distilled", "tiny-helios"):
        checkpoint = read_checkpoint(make_checkpoint("--random", preset), resolution=SIZE)
        model, reference = checkpoint.model, Reference(checkpoint)
        own = plan(model.pyramid, SIZE, model.schedule("2-2-1"), 2)
        assert reference.modules.follows_pipeline(checkpoint, own)
        for other in (model.schedule(levels=[[0.99], [0.8], [0.4]]), model.schedule("2-2-1", solver="renoise")):
            assert not reference.modules.follows_pipeline(checkpoint, plan(model.pyramid, SIZE, other, 2))


def follows(folder: Path) -> bool:
    """Whether the reference of a folder's own schedule is diffusers' pipeline."""
    checkpoint = read_checkpoint(folder, resolution=SIZE)
    model = checkpoint.model
    steps = plan(model.pyramid, SIZE, model.schedule(), 2)
    return Reference(checkpoint).modules.follows_pipeline(checkpoint, steps)


@pytest.fixture
def described(lean: Checkpoint, tmp_path: Path) -> Path:
    """A folder with the `pyramid.json` that its scheduler stands for."""
    folder = tmp_path / "described"
    shutil.copytree(lean.folder, folder)
    document = lean.model.to_json() | {"resolution": vars(SIZE)}
    (folder / "pyramid.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, True),
        ({"wavelet": "db2"}, False),
        ({"clean_levels": [0.0, 0.4, 0.8]}, False),
        ({"clock": {"timesteps": [[300.0, 1.0], [700.0, 301.0], [999.0, 701.0]]}}, False),
        ({"clock": {"whole": False}}, False),
        ({"clock": {"dynamic_shift": None}}, False),
    ],
    ids=str,
)
def test_what_pyramid_json_says_is_not_the_pipelines_unless_its_scheduler_says_it_too(
    described: Path, fields: dict[str, Any], own: bool
) -> None:
    path = described / "pyramid.json"
    document = json.loads(path.read_text())
    clock = document["clock"] | fields.get("clock", {})
    path.write_text(json.dumps(document | fields | {"clock": clock}))
    assert follows(described) is own


def test_a_folder_whose_pyramid_json_says_all_needs_no_scheduler(described: Path) -> None:
    file = described / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gamma": 0.25}))
    assert not follows(described)
    file.unlink()
    assert not follows(described)


@pytest.fixture(scope="module")
def lean(shared: Any, make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """A transformer alone, of one block, with an amplified history and a LoRA."""

    def write(out: Path) -> None:
        folder = amplified(make_checkpoint(*LEAN, "--blocks", "1"), out / "checkpoint", "per_head")
        with_lora(read_checkpoint(folder, resolution=SIZE), out / "style.safetensors")

    made = shared(("lean helios",), write)
    checkpoint = read_checkpoint(made / "checkpoint", resolution=SIZE)
    return merge_loras(checkpoint, [parse_lora(f"{made / 'style.safetensors'}:0.5")])


@pytest.fixture(scope="module")
def lean_bundle(lean: Checkpoint, bundle_of: Callable[..., Path]) -> Path:
    (lora,) = lean.loras
    return bundle_of(lean.folder, "--lora", f"{lora.file}:{lora.scale}")


@pytest.fixture(scope="module")
def trace(lean: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("helios") / "trace.safetensors"
    schedule = lean.model.schedule("1-1-1")
    record_trace(lean, path, prompts=["a cat"], seeds=[0], schedule=schedule, negative_prompt="", chunks=2)
    return path


def test_a_bundle_agrees_with_its_trace(lean_bundle: Path, trace: Path) -> None:
    result = parity(lean_bundle, trace)
    assert result["passed"], result
    assert result["levels"]["stages"]["relative_l2"] <= 1e-5


def several(checkpoint: Checkpoint, target: str, **options: Any) -> Blueprint:
    """A bundle that samples at two sizes, one of them longer."""
    found = find_build_target(target)
    request = BuildRequest(resolutions=(SIZE, Resolution(17, 64, 64)), target=options)
    return draw(checkpoint, found, resolve_options(checkpoint, found, request))


@pytest.mark.parametrize("mode", ["per_head", "scalar"])
def test_graphs_of_each_size_amplify_a_history_as_diffusers_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    folder = amplified(make_checkpoint(*LEAN, "--blocks", "1"), tmp_path / "checkpoint", mode)
    checkpoint = read_checkpoint(folder, resolution=SIZE)
    drawn, reference, random = several(checkpoint, "ort"), Reference(checkpoint), np.random.default_rng(0)
    assert [name for name in drawn.programs if name.startswith("stage2")] == ["stage2", "stage2_17x64x64"]
    for (graph,) in drawn.programs.values():
        for name, source in sources_of(graph.module).items():
            made = (read_tensor(checkpoint.transformer[source.tensor]),)
            for step in source.steps:
                made = step.apply(made[0], 0)
            module, _, leaf = name.rpartition(".")
            setattr(graph.module.get_submodule(module), leaf, torch.nn.Parameter(made[source.output]))
        given = {t.name: random.standard_normal(t.shape, np.float32)[0] for t in graph.spec.inputs}
        step = single_step(checkpoint.model.pyramid, checkpoint.model.stages(SIZE)[graph.spec.key.stage], 0.9)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128).tolist()
        given["timestep_features"] = timestep_features(step.timestep, frequencies)[0]
        ours = graph.module(*(torch.from_numpy(given[t.name])[None] for t in graph.spec.inputs))[0].detach().numpy()
        told = {name: given[name] for name in ("text", "history")}
        # Sums of float32 in another order; seen: 4e-7, and 0.1 without the scales.
        assert distance(ours, reference.velocity(step, given["latent"], told)).relative_l2 <= 2e-6, graph.spec.name


def clock_of_another_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Clock.timestep
    monkeypatch.setattr(Clock, "timestep", lambda self, stage, rho: real(self, (stage + 1) % 3, rho))


def timesteps_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Clock.timestep
    monkeypatch.setattr(Clock, "timestep", lambda self, stage, rho: real(replace(self, whole=False), stage, rho))


def history_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = History.of
    monkeypatch.setattr(History, "of", lambda *given: np.ascontiguousarray(real(*given)[:, ::-1]))


def weaker_block_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """γ 1/4 makes it c·√5 / (√5·c + 1 - c) of what is upsampled, in place of √3·c / (1 + c)."""
    real = sampler.upsample_and_renoise

    def other(x: Any, sigma: float, taps: Any, axes: Any, noise: Any) -> Any:
        alpha = 1 / (math.sqrt(5) * sigma + 1 - sigma)
        clean, whole = x.repeat(2, 2).repeat(2, 3), real(x, sigma, taps, axes, noise)
        block = (whole * (1 + sigma) - clean) / (math.sqrt(3) * sigma)
        return (alpha * (clean + 2 * sigma * block)).astype(np.float32)

    monkeypatch.setattr(sampler, "upsample_and_renoise", other)


def velocity_by_sigma(monkeypatch: pytest.MonkeyPatch) -> None:
    def sigmas(self: Pyramid, stage: Any, level: float, after: float) -> Any:
        return tuple((g.global_level(stage.index, level), g.global_level(stage.index, after)) for g in stage.groups)

    monkeypatch.setattr(Pyramid, "sigmas", sigmas)


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        (clock_of_another_stage, {"stages", "chain"}),
        (timesteps_not_cut, {"stages", "chain"}),
        (history_reversed, {"chain"}),
        (weaker_block_noise, {"chain"}),
        (velocity_by_sigma, {"chain"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_fail_at_their_level(
    fault: Callable[[pytest.MonkeyPatch], None],
    failed: set[str],
    lean_bundle: Path,
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    levels = parity(lean_bundle, trace)["levels"]
    assert {name for name, level in levels.items() if not level["passed"]} == failed


def test_a_run_that_is_killed_goes_on_after_the_chunks_that_it_finished(
    make_checkpoint: Callable[..., Path],
    bundle_of: Callable[..., Path],
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pyrexport.runtime.pipeline import chunks

    bundle = bundle_of(make_checkpoint("--random", "tiny-helios-distilled"))
    command = ("sample", bundle, "--prompt", "a cat", "--schedule", "1-1-1", "--chunks", 3, "--json")
    assert cli(*command, "-o", tmp_path / "whole.npz").exit_code == 0
    real, kept = chunks.require_finite, tmp_path / "cut.npz.latents.npy"

    def stops(values: Any, what: str) -> None:
        if what.startswith("the latents") and kept.exists():
            raise KeyboardInterrupt
        real(values, what)

    monkeypatch.setattr(chunks, "require_finite", stops)
    stopped = cli(*command, "-o", tmp_path / "cut.npz")
    assert stopped.exit_code != 0
    assert not (tmp_path / "cut.npz").exists()
    assert np.load(kept).shape == LATENT
    monkeypatch.undo()
    again = cli(*command, "-o", tmp_path / "cut.npz", "--save-latents", tmp_path / "cut.npy")
    assert again.exit_code == 0, again.output
    assert "going on from the chunks" in again.stderr
    assert not kept.exists()
    frames = [np.load(tmp_path / name)["frames"] for name in ("whole.npz", "cut.npz")]
    assert frames[0].shape == (25, 64, 128, 3)
    np.testing.assert_array_equal(*frames)
    assert np.load(tmp_path / "cut.npy").shape == (16, 9, 8, 16)


def test_frames_come_chunk_by_chunk(make_checkpoint: Callable[..., Path], bundle_of: Callable[..., Path]) -> None:
    seen: list[Any] = []
    with pyrexport.load(bundle_of(make_checkpoint("--random", "tiny-helios-distilled")), resident=True) as pipeline:
        pipeline(
            "a cat",
            schedule="1-1-1",
            frames=10,
            callback=lambda step: seen.append(step.plan.chunk),
            on_frames=lambda frames: seen.append(len(frames)),
        )
    assert seen == [*[0] * 6, 1, 4, 4, *[1] * 3, 1, 4, 3]


def test_only_models_of_chunks_take_chunks(
    tiny: Path, make_checkpoint: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    out = ("--prompt", "a cat", "-o", tmp_path / "out.npy")
    assert "makes videos whole" in refused("sample", tiny, "--resolution", "17x64x64", "--chunks", 2, *out)
    helios = ("sample", make_checkpoint("--random", "tiny-helios"), "--resolution", SIZE, *out)
    assert "either chunks or frames" in refused(*helios, "--chunks", 2, "--frames", 9)
    assert "whole numbers from 1, found 0" in refused(*helios, "--chunks", 0)


def test_stages_are_one_network_where_shapes_are_symbolic(make_checkpoint: Callable[..., Path]) -> None:
    """The history's tokens are a fixed part of a sequence whose length is symbolic, in blocks that are repeated too."""
    target, checkpoint = find_build_target("trt"), read_checkpoint(make_checkpoint(*LEAN), resolution=SIZE)
    blueprint = draw(checkpoint, target, build_options(checkpoint, target, compute_capabilities=["8.9"]))
    (graphs,) = blueprint.programs.values()
    assert [graph.spec.name for graph in graphs] == ["stage0", "stage1", "stage2"]
    model = export_onnx(graphs[0], blueprint.dialect, "stages").model
    inputs = {str(value.name): value.shape for value in model.graph.inputs}
    assert inputs["history"] == (1, 16, 20, 8, 16)
    assert inputs["latent"] is not None
    assert not inputs["latent"].is_static()
    # Histories of another size are tokens of another number: a network for each size.
    programs = several(checkpoint, "trt", compute_capabilities=["8.9"]).programs
    assert {name: len(own) for name, own in programs.items()} == {"stages": 3, "stages_17x64x64": 3}


def test_a_recipe_is_made_of_chunks_with_a_history(
    lean: Checkpoint, cli: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    how = ("--prompts", tmp_path / "prompts.txt", "--resolution", SIZE, "--schedule", "1-1-1", "--quiet")
    made = cli("calibrate", lean.folder, *how, "-o", tmp_path / "recipe.safetensors")
    assert made.exit_code == 0, made.output
    assert "10 layers of a clocked checkpoint" in made.stdout
