"""Diffusers' own pipeline, unmodified, with the scheduler of the checkpoint's folder: the oracle of plain models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from ....runtime.chain.guidance import PLAIN_GUIDANCE
from ....runtime.chain.plan import StepPlan
from ....runtime.chain.pyramid import Resolution
from ....runtime.chain.sampler import Step
from ....runtime.documents import read_json
from ....runtime.errors import UsageError
from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.scheduler import read_scheduler, scheduler_class

__all__ = ["follows_pipeline", "run_pipeline"]

Latent = NDArray[np.float32]


def follows_pipeline(checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
    """Whether a run is one that the checkpoint's own pipeline makes: its solver, and the levels of its scheduler."""
    first = steps[0]
    if checkpoint.model.pyramid.kind.spacing != "sigmas" or (first.guided and first.guidance != PLAIN_GUIDANCE):
        return False
    try:
        if scheduler_class(checkpoint.folder) is None:
            return False
        solver, _ = read_scheduler(checkpoint.folder)
    except UsageError:  # a folder whose `pyramid.json` says everything needs no scheduler that is supported
        return False
    if solver != first.solver or solver.facts.draws or first.scaled_start:
        return False
    sigmas = _scheduler(checkpoint, len(steps)).sigmas[:-1].numpy()
    return np.allclose(sigmas, [step.level for step in steps], atol=2e-6)  # float32, and 1e-6 short of 1


def _scheduler(checkpoint: Checkpoint, steps: int) -> Any:
    kind: Any = getattr(diffusers, scheduler_class(checkpoint.folder) or "")
    scheduler = kind.from_pretrained(str(checkpoint.folder / "scheduler"))
    scheduler.set_timesteps(steps)
    return scheduler


def run_pipeline(
    checkpoint: Checkpoint,
    transformers: Sequence[Any],
    steps: Sequence[StepPlan],
    latent: Latent,
    text: Latent,
    negative: Latent,
    keep: Callable[[Step], None],
) -> Latent:
    """Sample with diffusers' `WanPipeline`.

    Args:
        checkpoint: whose scheduler is taken from its folder.
        transformers: diffusers' modules, one for each of the model's networks.
        steps: of the run; see `follows_pipeline`.
        latent: the initial one [C, T, H, W].
        text: embeddings of the prompt [text length, text width].
        negative: those of the negative prompt, used where steps are guided.
        keep: called after each step.

    Returns:
        The latent after the last step [C, T, H, W].

    Raises:
        UsageError: the scheduler gives none that is finite.
    """
    pipeline, before = _pipeline(checkpoint, transformers, len(steps)), latent
    with _solvable(checkpoint, len(steps)), _outputs_of(transformers) as outputs:

        def taken(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            nonlocal before
            given, before = before, tensors["latents"][0].numpy().copy()
            keep(Step(steps[index], _guided(outputs, steps[index]), before, given))
            return {}

        embeds = {"prompt_embeds": text, "negative_prompt_embeds": negative, "latents": latent}
        pipeline(
            **{name: torch.from_numpy(values)[None] for name, values in embeds.items()},
            **_request(checkpoint.resolution, steps),
            callback_on_step_end=taken,
        )
    if not np.isfinite(before).all():
        raise _no_oracle(checkpoint, len(steps))
    return before


def _pipeline(checkpoint: Checkpoint, transformers: Sequence[Any], steps: int) -> Any:
    index = read_json(checkpoint.folder / "model_index.json")
    how = {"boundary_ratio": checkpoint.model.pyramid.boundary, "expand_timesteps": bool(index.get("expand_timesteps"))}
    pipeline = WanPipeline(None, None, None, _scheduler(checkpoint, steps), *transformers, **how)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _solvable(checkpoint: Checkpoint, steps: int) -> Iterator[None]:
    """UniPC solves a system of equations in each step, which some of its options make singular."""
    try:
        yield
    except RuntimeError as error:  # of which PyTorch's error of linear algebra is one
        if "linalg" not in str(error):
            raise
        raise _no_oracle(checkpoint, steps) from error


def _no_oracle(checkpoint: Checkpoint, steps: int) -> UsageError:
    return UsageError(
        f"{checkpoint.folder}: diffusers' own {scheduler_class(checkpoint.folder)} gives no finite latents with the "
        f"options of this folder over {steps} steps: there is nothing to compare with; choose others, such as "
        "lower_order_final true"
    )


def _request(resolution: Resolution, steps: Sequence[StepPlan]) -> dict[str, Any]:
    """A pipeline's arguments for latents of a resolution, after steps of which each network's are guided alike."""
    size = {"height": resolution.height, "width": resolution.width, "num_frames": resolution.frames}
    scales = {step.expert: step.guidance_scale for step in reversed(steps)}
    how = {"num_inference_steps": len(steps), "guidance_scale": scales[steps[0].expert]}
    second = {"guidance_scale_2": scales[1]} if 1 in scales else {}
    return {**size, **how, **second, "output_type": "latent"}


@contextmanager
def _outputs_of(modules: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """What modules give meanwhile, in order."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _guided(outputs: list[torch.Tensor], step: StepPlan) -> Latent:
    """The velocity of a step from what the transformer gave for it, which is taken off the list."""
    conditional, *rest = outputs
    outputs.clear()
    velocity = conditional
    for unconditional in rest:
        velocity = unconditional + step.guidance_scale * (conditional - unconditional)
    return velocity[0].numpy().copy()
