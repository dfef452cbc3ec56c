"""Previews while a sample is made: small images from the latents alone, after each step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..chain.sampler import Step
from ..errors import UsageError
from ..model.preview import Preview, PreviewMap

__all__ = ["clean_latent", "preview_map", "showing"]


def clean_latent(step: Step) -> NDArray[np.float32]:
    """What a step says of the clean latent: x0 = x - σ·v in each frame group, at the scale of its stage.

    Where a velocity is the derivative by another time than σ, a stage's clock, it is taken to σ first.
    """
    out, plan = np.empty_like(step.latent), step.plan
    for group, (time, after) in zip(plan.stage.groups, plan.sigmas, strict=True):
        sigma, next_sigma = (group.global_level(plan.stage.index, level) for level in (plan.level, plan.next_level))
        by_sigma = sigma * (after - time) / (next_sigma - sigma)
        out[:, group.frames] = step.before[:, group.frames] - np.float32(by_sigma) * step.velocity[:, group.frames]
    return out


def preview_map(found: PreviewMap | None, model: Path) -> PreviewMap:
    """A model's map for previews.

    Raises:
        UsageError: it has none.
    """
    if found is None:
        raise UsageError(f"{model} has no map for previews: its VAE had none, or is not there; leave previews out")
    return found


def showing(
    show: Callable[[Preview], None] | None,
    found: PreviewMap | None,
    model: Path,
    then: Callable[[Step], None] | None = None,
) -> Callable[[Step], None] | None:
    """A callback of the chain that shows each step by a model's map, if asked to, and calls another one after it.

    Raises:
        UsageError: the model has no map for previews.
    """
    if show is None:
        return then
    used = preview_map(found, model)

    def callback(step: Step) -> None:
        show(used.show(clean_latent(step)))
        if then is not None:
            then(step)

    return callback
