"""What a run in chunks leaves when it is stopped is taken up by that run alone, and where it can be its own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import build
from pyrexport.calibration.sensitivity import Judge, _middle
from pyrexport.calibration.watching import _decode
from pyrexport.cli.jobs import Job
from pyrexport.cli.reading import Reading
from pyrexport.cli.running import RunOptions
from pyrexport.cli.samplers import open_sampler
from pyrexport.cli.videos import VideoOptions
from pyrexport.export.reference.record import record_trace
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.chain.guidance import Guidance
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.schedules import Schedule
from pyrexport.runtime.chain.solvers import SolverChoice
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.schedules import schedule_json
from pyrexport.runtime.pipeline.chunks import chunk_count, split
from pyrexport.runtime.pipeline.latents import Origin, origin_file, save_latents
from pyrexport.runtime.proof.trace import Trace
from pyrexport.runtime.reporter import Reporter
from support.builders import resign

SIZE = Resolution(9, 64, 128)
LATENT = (16, 3, 8, 16)
Left = tuple[tuple[Any, ...], Path, Origin]


@pytest.fixture
def left(make_checkpoint: Callable[..., Path], shared: Callable[..., Path], tmp_path: Path) -> Left:
    """A command of 2 chunks, the file in which it finds the first of them, and what it expects beside that."""
    checkpoint, bundle = make_checkpoint("--random", "tiny-helios-distilled"), tmp_path / "bundle"
    made = shared(("helios", str(checkpoint)), lambda out: build(checkpoint, out, "--resolution", str(SIZE)))
    shutil.copytree(made, bundle)
    out = tmp_path / "out.npy"
    with open_sampler(bundle, Reading(), EngineOptions(1), resident=False, decoder=None, cache=False) as sampler:
        options = RunOptions(bundle, VideoOptions(), None, 2, sampler.model.schedule("1-1-1"), "", None)
        origin = options.start(sampler).origin(Job("a cat", out, None, None))
    command = ("sample", bundle, "--prompt", "a cat", "--schedule", "1-1-1", "--chunks", 2, "--quiet", "-o", out)
    return command, tmp_path / "out.npy.latents.npy", origin


@pytest.mark.parametrize("changed", ["clock", "schedules"])
def test_chunks_of_a_model_of_other_facts_are_of_another_run(
    left: Left, refused: Callable[..., str], changed: str
) -> None:
    command, file, origin = left
    save_latents(file, np.zeros(LATENT, np.float32), origin)
    model = json.loads((command[1] / "manifest.json").read_text())["model"]
    if changed == "clock":
        model["clock"]["dynamic_shift"]["form"] = "exponential"
    else:
        model["schedules"]["2-2-2"] |= {"guidance": "zero-star", "zeroed_steps": 2}
    resign(command[1], model=model)
    assert "holds latents of another run that was stopped" in refused(*command)


def test_a_run_whose_first_chunk_or_guidance_is_another_is_another_run(
    left: Left,
) -> None:
    schedule = Schedule("2-2-2", ((0.9,),), 5.0)
    others = [replace(schedule, first_chunk=((0.9, 0.5),)), replace(schedule, guidance=Guidance("zero-star"))]
    others += [replace(schedule, guidance=Guidance(zeroed_steps=1)), replace(schedule, guidance_scale_2=3.0)]
    others += [replace(schedule, solver=SolverChoice.of("dmd")), replace(schedule, scaled_start=True)]
    assert len({json.dumps(schedule_json(each), sort_keys=True) for each in (schedule, *others)}) == 1 + len(others)
    facts = left[2].run
    assert {"first_chunk", "identity", "levels"} <= facts.keys()
    assert [len(group) for group in facts["first_chunk"]] == [2, 2, 2]


def test_what_cannot_be_chunks_that_were_left_is_refused(
    left: Left, cli: Callable[..., Result], refused: Callable[..., str]
) -> None:
    command, file, origin = left
    channels, frames, *size = LATENT
    shapes: dict[str, tuple[int, ...]] = {"of shape [16, 3, 8, 16]": (channels, 2, *size)}
    shapes |= {"found float32 [16, 4, 8, 16]": (channels, 4, *size), "found float32 [16, 0": (channels, 0, *size)}
    shapes |= {"at most 2 chunks, found those of 3": (channels, 3 * frames, *size), "found float32 [5]": (5,)}
    shapes |= {"found float32 [8, 3": (8, frames, *size), "found float32 [16, 3, 4, 16]": (channels, frames, 4, 16)}
    for said, shape in shapes.items():
        save_latents(file, np.zeros(shape, np.float32), origin)
        line = refused(*command)
        assert said in line
        assert f"remove {file} to sample it again" in line
    save_latents(file, np.zeros(LATENT, np.int32), origin)
    assert "found int32" in refused(*command)
    for content in (b"", file.read_bytes()[: file.stat().st_size // 2]):
        file.write_bytes(content)
        assert "expected latents as .npy" in refused(*command)
    save_latents(file, np.full(LATENT, np.nan, np.float32), origin)
    failed = cli(*command)
    assert failed.exit_code == 1
    assert "not finite" in failed.stderr
    assert file.exists()


def test_latents_of_a_run_are_not_left_beside_another(left: Left, refused: Callable[..., str]) -> None:
    command, file, origin = left
    save_latents(file, np.zeros(LATENT, np.float32), origin)
    one = [1 if word == 2 else word for word in command]
    assert "of another run that was stopped: run the command that sampled them again" in refused(*one)
    origin_file(file).unlink()
    for each in (one, command):
        assert "nothing beside them (out.npy.latents.npy.json) says of which run" in refused(*each)


def test_latents_that_are_no_whole_chunks_are_not_decoded(make_checkpoint: Callable[..., Path]) -> None:
    model = read_checkpoint(make_checkpoint("--random", "tiny-helios-distilled"), resolution=SIZE).model
    for frames in (0, 2, 4, 7):
        with pytest.raises(UsageError, match=f"whole chunks of 3 latent frames, found {frames}"):
            split(np.zeros((16, frames, 8, 16), np.float32), model, SIZE)
    assert [chunk.shape[1] for chunk in split(np.zeros((16, 6, 8, 16), np.float32), model, SIZE)] == [3, 3]
    assert chunk_count(model, SIZE, np.int64(2), None) == 2  # type: ignore[arg-type]


def test_quality_compares_the_videos_of_all_chunks(
    left: Left, make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(make_checkpoint("--random", "tiny-helios-distilled"), resolution=SIZE)
    trace, schedule = tmp_path / "trace.safetensors", checkpoint.model.schedule("1-1-1")
    record_trace(checkpoint, trace, prompts=["a cat"], seeds=[0], schedule=schedule, negative_prompt="", chunks=2)
    assert [run.steps for run in Trace(trace).runs] == [6 + 3]
    found = cli("quality", left[0][1], "--trace", trace, "--min-psnr", 50, "--json", "--quiet")
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["runs"][0]["frame_psnr"]) == 17


def test_bench_counts_what_is_evaluated(left: Left, cli: Callable[..., Result]) -> None:
    """Of a schedule whose first two steps have a velocity of zero: in 3-1-1 one step of three is evaluated, twice."""
    bundle = left[0][1]
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    own = model["schedules"][model["default_schedule"]]
    own |= {"guidance": "zero-star", "zeroed_steps": 2, "guidance_scale": 5.0, "amplify_first_chunk": False}
    resign(bundle, model=model)
    for schedule, calls in (("2-1-1", {"stage1": 2, "stage0": 2}), ("3-1-1", {"stage2": 2, "stage1": 2, "stage0": 2})):
        found = cli("bench", bundle, "--runs", 1, "--schedule", schedule, "--json", "--quiet")
        assert found.exit_code == 0, (found.output, found.exception)
        graphs = json.loads(found.stdout)["graphs"]
        assert {name: graph["calls"] for name, graph in graphs.items() if name.startswith("stage")} == calls


def test_a_stage_that_is_never_evaluated_is_not_calibrated(
    make_checkpoint: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    lean = make_checkpoint("--random", "tiny-helios", "--no-text-encoder", "--no-vae")
    how = ("--prompts", tmp_path / "prompts.txt", "--resolution", SIZE, "--schedule", "2-1-1")
    line = refused("calibrate", lean, *how, "-o", tmp_path / "recipe.safetensors", "--quiet")
    assert "'2-1-1' evaluates nothing in stage 2" in line
    assert "expected at least 3 steps there" in line


def test_a_recipe_is_of_what_is_evaluated_and_decodes_each_chunk_alone(make_checkpoint: Callable[..., Path]) -> None:
    guided = read_checkpoint(make_checkpoint("--random", "tiny-helios"), resolution=SIZE)
    steps = plan(guided.model.pyramid, SIZE, guided.model.schedule("3-1-1"))
    assert [step.evaluations for step in steps] == [0, 0, 2, 2, 2]
    assert _middle(steps, 2).position == 2
    assert _middle(plan(guided.model.pyramid, SIZE, guided.model.schedule("3-1-1"), 2), 0).chunk == 1
    seen: list[tuple[int, ...]] = []
    reference: Any = SimpleNamespace(checkpoint=guided, decode_float=lambda latent, _: seen.append(latent.shape))
    _decode(reference, np.zeros((16, 6, 8, 16), np.float32))
    assert seen == [LATENT, LATENT]


def test_what_rounding_costs_is_judged_with_a_history(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = read_checkpoint(make_checkpoint("--random", "tiny-helios-distilled"), resolution=SIZE)
    reference, seen, model = Reference(checkpoint), list[bool](), checkpoint.model
    steps = plan(model.pyramid, SIZE, model.schedule("1-1-1"), model.telling_chunks)
    judge = Judge(reference, steps, {}, {}, Reporter())
    judge.add(reference.encode(["a cat"])[0], 0)
    assert judge.runs[0].frames.shape == (17, 64, 128, 3)
    real = reference.velocity

    def told(step: Any, latent: Any, conditions: Any) -> Any:
        seen.append(bool(conditions["history"][:, -3:].all()) and not conditions["history"][:, 1:-3].any())
        return real(step, latent, conditions)

    reference.velocity = told  # type: ignore[method-assign]
    assert judge.damage({}) == {}
    assert seen == [True] * 3
