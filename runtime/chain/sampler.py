"""The sampling chain: Euler steps within a stage, upsampling and renoising between stages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .noise import generator, standard_normal
from .pyramid import Pyramid
from .resample import upsample_and_renoise
from .schedules import Schedule

__all__ = ["Denoiser", "Step", "euler_step", "floats", "initial_latent", "sample", "transition"]

Latent = NDArray[np.float32]


class Denoiser(Protocol):
    """What evaluates a stage: an engine, or the PyTorch reference."""

    def velocity(self, stage: int, latent: Latent, timestep: float, text: NDArray[np.float32]) -> Latent:
        """d x / d σ of the stage's own global level, per frame group.

        Args:
            stage: 0 is the finest.
            latent: [C, T, H, W], float32.
            timestep: 1000·ς, not rounded.
            text: [text length, text width], float32.

        Returns:
            [C, T, H, W], float32.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One Euler step that has been taken."""

    stage: int
    index: int
    """Counted from 0 within the stage."""
    level: float
    """Natural level that the step started from."""
    next_level: float
    velocity: Latent
    """After guidance."""
    latent: Latent
    """After the step."""


def initial_latent(pyramid: Pyramid, noise: np.random.Generator) -> Latent:
    """N(0, I) at the coarsest stage's shape [C, T, H, W], in one draw."""
    return standard_normal(noise, pyramid.stages[-1].latent)


def floats(values: NDArray[np.floating[Any]], shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """An array that a caller gave, as float32.

    Raises:
        UsageError: it is of another shape, or not of floating-point numbers.
    """
    found = np.asarray(values)
    if found.shape != shape or found.dtype.kind != "f":
        raise UsageError(f"{what}: expected floats of shape {list(shape)}, found {found.dtype} {list(found.shape)}")
    return found.astype(np.float32)


def euler_step(
    pyramid: Pyramid, stage: int, latent: Latent, velocity: Latent, level: float, next_level: float
) -> Latent:
    """x + (σ' - σ)·v in each frame group, where σ is the group's global level at this scale."""
    out = np.empty_like(latent)
    for group in pyramid.groups:
        increment = group.global_level(stage, next_level) - group.global_level(stage, level)
        out[:, group.frames] = latent[:, group.frames] + np.float32(increment) * velocity[:, group.frames]
    return out


def transition(pyramid: Pyramid, stage: int, latent: Latent, noise: np.random.Generator) -> Latent:
    """The latent that stage `stage - 1` starts from: R↑_N of each frame group (supplement eq. 16)."""
    if not pyramid.axes:
        return latent
    level = pyramid.stages[stage].clean
    groups = [
        upsample_and_renoise(latent[:, group.frames], group.global_level(stage, level), pyramid.taps, group.axes, noise)
        for group in pyramid.groups
    ]
    return np.concatenate(groups, axis=1)


def sample(
    pyramid: Pyramid,
    denoiser: Denoiser,
    text: NDArray[np.float32],
    schedule: Schedule,
    *,
    negative_text: NDArray[np.float32] | None = None,
    seed: int = 0,
    latents: Latent | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Latent:
    """Run the chain from noise to the finest stage's clean latent.

    Args:
        pyramid: the model.
        denoiser: evaluates a stage.
        text: prompt embeddings [text length, text width], float32.
        schedule: levels and guidance scale.
        negative_text: embeddings of the negative prompt; needed when the schedule is guided.
        seed: of all noise in the run.
        latents: initial latent in place of the first draw, which is made all the same: the noise of the
            transitions depends on the seed alone.
        callback: called after each step.

    Returns:
        Latent of stage 0 [C, T, H, W], float32, normalised as the transformer sees it.

    Raises:
        UsageError: guidance without negative embeddings, or a latent of another shape.
    """
    if schedule.guided and negative_text is None:
        raise UsageError(
            f"guidance scale {schedule.guidance_scale:g} needs the embeddings of a negative prompt; "
            "give them, or sample with guidance scale 1"
        )
    noise = generator(seed)
    x = initial_latent(pyramid, noise)
    if latents is not None:
        x = floats(latents, x.shape, "initial latents [C, T, H, W]")
    for stage, levels in zip(reversed(pyramid.stages), schedule.levels, strict=True):
        for index, (level, next_level) in enumerate(zip(levels, (*levels[1:], stage.clean), strict=True)):
            v = denoiser.velocity(stage.index, x, 1000 * level, text)
            if schedule.guided:
                assert negative_text is not None
                unconditional = denoiser.velocity(stage.index, x, 1000 * level, negative_text)
                v = unconditional + np.float32(schedule.guidance_scale) * (v - unconditional)
            x = euler_step(pyramid, stage.index, x, v, level, next_level)
            if callback is not None:
                callback(Step(stage.index, index, level, next_level, v, x))
        if stage.index > 0:
            x = transition(pyramid, stage.index, x, noise)
    return x
