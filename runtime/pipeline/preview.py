"""Previews while a sample is made: small images from the latents alone, after each step."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..bundle.opening import Bundle
from ..chain.sampler import Step
from ..errors import UsageError
from ..model.preview import Preview

__all__ = ["clean_latent", "showing"]


def clean_latent(step: Step) -> NDArray[np.float32]:
    """What a step says of the clean latent: x0 = x' - σ'·v in each frame group, at the scale of its stage."""
    out = np.empty_like(step.latent)
    for group, (_, sigma) in zip(step.plan.stage.groups, step.plan.sigmas, strict=True):
        frames = group.frames
        out[:, frames] = step.latent[:, frames] - np.float32(sigma) * step.velocity[:, frames]
    return out


def showing(
    bundle: Bundle, show: Callable[[Preview], None] | None, then: Callable[[Step], None] | None
) -> Callable[[Step], None] | None:
    """A callback of the chain that shows each step, where that is asked for, and calls another one after it.

    Raises:
        UsageError: the bundle has no map for previews.
    """
    if show is None:
        return then
    found = bundle.manifest.preview
    if found is None:
        raise UsageError(
            f"{bundle.folder} has no map for previews: its VAE had none, or is not there; leave previews out"
        )

    def callback(step: Step) -> None:
        show(found.show(clean_latent(step)))
        if then is not None:
            then(step)

    return callback
