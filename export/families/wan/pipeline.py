"""Diffusers' own pipeline, unmodified, with the scheduler of the checkpoint's folder: the oracle of plain models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from ....runtime.chain.plan import StepPlan
from ....runtime.chain.pyramid import Resolution
from ....runtime.chain.sampler import Step
from ....runtime.documents import read_json
from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.scheduler import read_scheduler

__all__ = ["follows_pipeline", "run_pipeline"]

Latent = NDArray[np.float32]


def follows_pipeline(checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
    """Whether a run is one that the checkpoint's own pipeline makes: its solver, and the levels of its scheduler."""
    file = checkpoint.folder / "scheduler" / "scheduler_config.json"
    if checkpoint.model.pyramid.kind.spacing != "sigmas" or not file.is_file():
        return False
    solver, _ = read_scheduler(checkpoint.folder)
    if solver != steps[0].solver or solver.facts.draws or steps[0].scaled_start:
        return False
    sigmas = _scheduler(checkpoint, len(steps)).sigmas[:-1].numpy()
    return np.allclose(sigmas, [step.level for step in steps], atol=2e-6)  # float32, and 1e-6 short of 1


def _scheduler(checkpoint: Checkpoint, steps: int) -> Any:
    folder = checkpoint.folder / "scheduler"
    kind = getattr(diffusers, read_json(folder / "scheduler_config.json")["_class_name"])
    scheduler = kind.from_pretrained(str(folder))
    scheduler.set_timesteps(steps)
    return scheduler


def run_pipeline(
    checkpoint: Checkpoint,
    transformer: Any,
    steps: Sequence[StepPlan],
    latent: Latent,
    text: Latent,
    negative: Latent,
    keep: Callable[[Latent, Step], None],
) -> Latent:
    """Sample with diffusers' `WanPipeline`.

    Args:
        checkpoint: whose scheduler is taken from its folder.
        transformer: diffusers' module.
        steps: of the run; see `follows_pipeline`.
        latent: the initial one [C, T, H, W].
        text: embeddings of the prompt [text length, text width].
        negative: those of the negative prompt, used where steps are guided.
        keep: given the latent before each step, and the step.

    Returns:
        The latent after the last step [C, T, H, W].
    """
    pipeline = WanPipeline(None, None, None, _scheduler(checkpoint, len(steps)), transformer)
    pipeline.set_progress_bar_config(disable=True)
    before = latent
    with _outputs_of(transformer) as outputs:

        def taken(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            nonlocal before
            after = tensors["latents"][0].numpy().copy()
            keep(before, Step(steps[index], _guided(outputs, steps[index]), after))
            before = after
            return {}

        pipeline(
            prompt_embeds=torch.from_numpy(text)[None],
            negative_prompt_embeds=torch.from_numpy(negative)[None],
            num_inference_steps=len(steps),
            guidance_scale=steps[0].guidance_scale,
            latents=torch.from_numpy(latent)[None],
            callback_on_step_end=taken,
            **_size(checkpoint.resolution),
        )
    return before


def _size(resolution: Resolution) -> dict[str, Any]:
    """A pipeline's arguments for latents of a resolution."""
    size = {"height": resolution.height, "width": resolution.width, "num_frames": resolution.frames}
    return {**size, "output_type": "latent"}


@contextmanager
def _outputs_of(module: Any) -> Iterator[list[torch.Tensor]]:
    """What a module gives meanwhile, in order."""
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    try:
        yield outputs
    finally:
        handle.remove()


def _guided(outputs: list[torch.Tensor], step: StepPlan) -> Latent:
    """The velocity of a step from what the transformer gave for it, which is taken off the list."""
    conditional, *rest = outputs
    outputs.clear()
    velocity = conditional
    for unconditional in rest:
        velocity = unconditional + step.guidance_scale * (conditional - unconditional)
    return velocity[0].numpy().copy()
