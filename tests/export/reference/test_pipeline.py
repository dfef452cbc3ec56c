"""Plain models: what diffusers' unmodified WanPipeline makes from the same folder."""

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
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.sampler import initial_latent
from pyrexport.runtime.chain.solvers import SolverChoice
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.proof.metrics import distance

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
SMALL = {"height": 64, "width": 64, "num_frames": 17}


def with_scheduler(folder: Path, scheduler: dict[str, Any], out: Path) -> Path:
    """A copy of a plain folder with another scheduler, as diffusers would have saved it."""
    shutil.copytree(folder, out)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((out / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (out / "model_index.json").write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder with UniPC, as Wan2.1's own."""
    plain = make_checkpoint("--kind", "plain")
    return with_scheduler(plain, UNIPC, tmp_path_factory.mktemp("plain") / "unipc")


@pytest.fixture(scope="module")
def plain_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "plain.pyrx"
    return pyrexport.build(checkpoint, out, resolution="17x64x64", vae_tile="none")


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "guidance"), [(4, 5.0), (8, 5.0), (8, 1.0), (50, 5.0), (50, 1.0)])
def test_a_bundle_makes_the_latents_of_their_own_pipeline(
    checkpoint: Path, plain_bundle: Path, steps: int, guidance: float
) -> None:
    """Within 1e-4, from the same initial latents, with the folder's UniPC of order 2 and shift 3; 25 s all."""
    with pyrexport.load(plain_bundle) as pipeline:
        how = {"schedule": str(steps), "guidance_scale": guidance, "negative_prompt": "blurred", "seed": 4}
        found = pipeline("a red circle moving left", output_type="latent", **how).latents
        schedule = pipeline.model.schedule(str(steps), guidance_scale=guidance)
        assert (schedule.solver.name, schedule.guided) == ("unipc", guidance > 1)
        run = plan(pipeline.model.pyramid, pipeline.bundle.manifest.resolution, schedule)
    theirs = WanPipeline.from_pretrained(str(checkpoint))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red circle moving left",
        negative_prompt="blurred",
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(initial_latent(run, generator(4)))[None],
        output_type="latent",
        max_sequence_length=pipeline.model.text_length,
        **SMALL,
    ).frames[0]
    assert distance(found, np.asarray(expected)).relative_l2 <= 1e-4


@pytest.mark.slow
def test_parity_of_a_plain_bundle_is_recorded_from_that_pipeline(
    checkpoint: Path, plain_bundle: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from our chain: its trace comes from WanPipeline, and the bundle passes against it; 20 s."""
    calls = []
    original = WanPipeline.__call__
    monkeypatch.setattr(WanPipeline, "__call__", lambda self, *a, **k: (calls.append(k), original(self, *a, **k))[1])
    how = ("--prompt", "a cat", "--schedule", "8", "--json", "--quiet")
    result = cli("parity", plain_bundle, "--reference", checkpoint, *how)
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert levels["chain"]["teacher_forced"]["relative_l2"] <= 1e-5
    assert [call["num_inference_steps"] for call in calls] == [8]


def test_the_folders_scheduler_chooses_the_solver(
    make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    """Class, shift and options, for the number of steps that the pipeline defaults to."""
    plain = make_checkpoint("--kind", "plain")
    folder = with_scheduler(plain, {**UNIPC, "solver_order": 3, "solver_type": "bh1"}, tmp_path / "order 3")
    schedule = json.loads(cli("inspect", folder, "--json").stdout)["schedules"]["50"]
    assert schedule["solver"] == {"name": "unipc", "order": 3, "variant": "bh1"}
    assert schedule["guidance_scale"] == 5.0
    assert schedule["levels"][0][1] == pytest.approx(3 * 0.98002 / (1 + 2 * 0.98002))  # shift 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "DPMSolverMultistepScheduler"},
            "DPMSolverMultistepScheduler has no solver here: expected one",
        ),
        ({"use_flow_sigmas": False}, "use_flow_sigmas False has no solver here: expected True"),
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ({"solver_order": 4}, "field 'solver_order': expected 1, 2 or 3"),
        ({"disable_corrector": [0]}, "disable_corrector"),
        ({"flow_shift": "three"}, "field 'flow_shift': expected a number"),
    ],
)
def test_a_scheduler_without_a_solver_is_refused_by_name(
    make_checkpoint: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    change: dict[str, Any],
    words: str,
) -> None:
    folder = with_scheduler(make_checkpoint("--kind", "plain"), UNIPC | change, tmp_path / "odd")
    assert words in refused("inspect", folder)


def test_a_number_is_so_many_steps_of_the_folders_scheduler(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where the paper distilled a model to so few."""
    folder = with_scheduler(make_checkpoint("--kind", "plain"), UNIPC, tmp_path / "unipc")
    model = read_checkpoint(folder).model
    for steps in ("2", "4"):
        schedule = model.schedule(steps)
        assert (schedule.solver.name, schedule.guidance_scale, schedule.steps) == ("unipc", 5.0, (int(steps),))
    assert model.schedule("distilled-4").guidance_scale == 1.0


def test_the_class_is_that_of_model_index(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As in diffusers, which reads the configuration into it whatever class that names."""
    folder = with_scheduler(make_checkpoint("--kind", "plain"), UNIPC, tmp_path / "both")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert read_checkpoint(folder).model.schedule("8").solver.name == "euler"
    assert type(WanPipeline.from_pretrained(str(folder)).scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("name", ["midpoint", "heun", "logrho"])
def test_what_diffusers_takes_for_bh2_is_bh2(make_checkpoint: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = with_scheduler(make_checkpoint("--kind", "plain"), UNIPC | {"solver_type": name}, tmp_path / name)
    assert read_checkpoint(folder).model.schedule("8").solver == SolverChoice.of("unipc")


def test_a_scheduler_that_was_not_fetched_is_missed(
    make_checkpoint: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    """Gone, or a link to nothing: never another solver in its place."""
    folder = with_scheduler(make_checkpoint("--kind", "plain"), UNIPC, tmp_path / "part")
    file = folder / "scheduler" / "scheduler_config.json"
    file.unlink()
    assert "model_index.json names the scheduler UniPCMultistepScheduler" in refused("inspect", folder)
    file.symlink_to("nowhere")
    assert "is missing" in refused("inspect", folder)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lower_order_final": False}, {"lower_order_final": False, "solver_order": 3}])
def test_options_that_break_diffusers_own_scheduler_are_told(
    make_checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """There is no trace to record: it gives NaN, or a singular system of equations."""
    plain = make_checkpoint("--kind", "plain", "--no-vae", "--no-text-encoder")
    folder = with_scheduler(plain, UNIPC | options, tmp_path / "nan")
    checkpoint = read_checkpoint(folder, resolution=Resolution(17, 64, 64))
    steps = plan(checkpoint.model.pyramid, checkpoint.resolution, checkpoint.model.schedule("8", guidance_scale=1.0))
    text = np.zeros((checkpoint.model.text_length, checkpoint.model.transformer.text_dim), np.float32)
    with pytest.raises(UsageError, match="gives no finite latents with the options of this folder over 8 steps"):
        Reference(checkpoint).sample(steps, text, text, 0, lambda step: None)


def test_what_the_pipeline_does_not_do_is_the_chains_to_do(checkpoint: Path, tmp_path: Path) -> None:
    """A guidance that WanPipeline has not; a scheduler that is none of ours, or not there."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    entry = {"steps": [4], "guidance_scale": 5.0, "shift": 3.0, "solver": "unipc"}
    size = {"frames": 17, "height": 64, "width": 64}

    def follows(**fields: object) -> bool:
        document = {"format": 1, "kind": "plain", "stages": 1, "resolution": size, "schedules": {"4": entry | fields}}
        (folder / "pyramid.json").write_text(json.dumps(document))
        found = read_checkpoint(folder)
        steps = plan(found.model.pyramid, found.resolution, found.model.schedule())
        return Reference(found).modules.follows_pipeline(found, steps)

    assert follows()
    assert not follows(guidance="zero-star")
    assert follows(guidance="zero-star", guidance_scale=1.0)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(UNIPC | {"thresholding": True}))
    assert not follows()
    file.unlink()
    assert not follows()
