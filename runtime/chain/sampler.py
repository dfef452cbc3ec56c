"""The sampling chain: a fold over the steps of a plan, from noise to the finest stage's clean latent."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .guidance import GUIDANCES
from .history import HISTORY, History
from .noise import generator, standard_normal
from .plan import StepPlan
from .pyramid import Stage
from .resample import upsample_and_renoise
from .wavelets import Taps

__all__ = [
    "Conditions",
    "Denoiser",
    "Step",
    "floats",
    "guided_velocity",
    "initial_latent",
    "sample",
    "sample_chunks",
    "told_of",
    "transition",
]

Latent = NDArray[np.float32]

Conditions = Mapping[str, NDArray[np.float32]]
"""What a stage is conditioned on beside its timestep, by the name of the graph's input: `text` [text length, width],
and `history` [C, frames, H, W] of a model that makes videos in chunks."""


class Denoiser(Protocol):
    """What evaluates a stage: an engine, or the PyTorch reference."""

    def velocity(self, step: StepPlan, latent: Latent, conditions: Conditions) -> Latent:
        """d x / d σ of the stage's own global level, per frame group; d x / d ρ where stages have clocks.

        Args:
            step: the step whose stage, expert and timestep are evaluated.
            latent: [C, T, H, W], float32.
            conditions: see `Conditions`.

        Returns:
            [C, T, H, W], float32.
        """
        ...


@dataclass(frozen=True)
class Step:
    """A step that has been taken."""

    plan: StepPlan
    velocity: Latent
    """The step's velocity, after guidance."""
    latent: Latent
    """The latent after the step."""
    before: Latent
    """The latent before it."""


def initial_latent(steps: Sequence[StepPlan], noise: np.random.Generator) -> Latent:
    """ε ~ N(0, I) at the first step's shape [C, T, H, W], in one draw; σ_0·ε where the run starts scaled."""
    first = steps[0]
    x = standard_normal(noise, first.stage.latent)
    for group, (sigma, _) in zip(first.stage.groups, first.sigmas, strict=True):
        x[:, group.frames] *= np.float32(sigma if first.scaled_start else 1.0)
    return x


def floats(values: NDArray[np.floating[Any]], shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """An array that a caller gave, as float32.

    Raises:
        UsageError: it is of another shape, or not of floating-point numbers.
    """
    found = np.asarray(values)
    if found.shape != shape or found.dtype.kind != "f":
        raise UsageError(f"{what}: expected floats of shape {list(shape)}, found {found.dtype} {list(found.shape)}")
    return found.astype(np.float32)


def guided_velocity(
    denoiser: Denoiser, step: StepPlan, latent: Latent, conditions: Conditions, negative: Conditions | None
) -> Latent:
    """The velocity of a step: guided as it says, or v_cond where it is not guided.

    Raises:
        UsageError: the step is guided, and there are no negative conditions.
    """
    if step.zeroed:
        return np.zeros_like(latent)
    velocity = denoiser.velocity(step, latent, conditions)
    if not step.guided:
        return velocity
    if negative is None:
        raise UsageError(
            f"guidance scale {step.guidance_scale:g} needs the embeddings of a negative prompt; "
            "give them, or sample with guidance scale 1"
        )
    unconditional = denoiser.velocity(step, latent, negative)
    return GUIDANCES[step.guidance.name](velocity, unconditional, step.guidance_scale)


def told_of(conditions: Conditions, history: History | None, past: Latent | None, step: StepPlan) -> Conditions:
    """Conditions with what a chunk is told of those before it, of a model that makes videos in chunks.

    Args:
        conditions: of a prompt.
        history: what is told.
        past: the latents of all chunks before [C, T, H, W].
        step: one of the chunk's.
    """
    if history is None:
        return conditions
    return {**conditions, HISTORY: history.of(past, step.stage.whole)}


def transition(taps: Taps, step: StepPlan, latent: Latent, noise: np.random.Generator) -> Latent:
    """The latent that the next finer stage starts from: R↑_N of each frame group (supplement eq. 16)."""
    if not any(group.axes for group in step.stage.groups):
        return latent
    groups = [
        upsample_and_renoise(latent[:, group.frames], sigma, taps, group.axes, noise)
        for group in step.stage.groups
        for sigma in [group.global_level(step.stage.index, step.next_level)]
    ]
    return np.concatenate(groups, axis=1)


def sample(
    steps: Sequence[StepPlan],
    taps: Taps,
    denoiser: Denoiser,
    conditions: Conditions,
    *,
    negative: Conditions | None = None,
    seed: int = 0,
    latents: Latent | None = None,
    callback: Callable[[Step], None] | None = None,
    history: History | None = None,
) -> Latent:
    """Run the chain; see `sample_chunks`.

    Returns:
        Latent of stage 0 [C, T, H, W], float32, normalised as the transformer sees it: all chunks, joined in time.

    Raises:
        UsageError: guidance without negative conditions, or a latent of another shape.
    """
    how: dict[str, Any] = {"negative": negative, "seed": seed, "latents": latents, "callback": callback}
    return np.concatenate(list(sample_chunks(steps, taps, denoiser, conditions, **how, history=history)), axis=1)


def sample_chunks(
    steps: Sequence[StepPlan],
    taps: Taps,
    denoiser: Denoiser,
    conditions: Conditions,
    *,
    negative: Conditions | None = None,
    seed: int = 0,
    latents: Latent | None = None,
    callback: Callable[[Step], None] | None = None,
    history: History | None = None,
    past: Latent | None = None,
) -> Iterator[Latent]:
    """Run the chain for one chunk after the other.

    Args:
        steps: the plan of the run; see `plan`.
        taps: low-pass taps of the pyramid's wavelet.
        denoiser: what evaluates a stage.
        conditions: what the prompt conditions a stage on.
        negative: those of the negative prompt; needed when a step is guided.
        seed: the seed of all noise in the run.
        latents: initial latent of the first chunk in place of the first draw, which is made all the same: the noise of
            the transitions depends on the seed alone.
        callback: called after each step.
        history: what a chunk is told of those before it.
        past: latents of the first chunks [C, T, H, W], where these are known: the run goes on after them.

    Yields:
        The latent of each chunk that is made, of stage 0 [C, T, H, W].

    Raises:
        UsageError: guidance without negative conditions, or a latent of another shape.
    """
    made = 0 if past is None else _made(past, steps[-1].stage)
    for chunk, own in groupby(steps, lambda step: step.chunk):
        if chunk < made:
            continue
        mine = tuple(own)
        told = told_of(conditions, history, past, mine[0])
        untold = None if negative is None else told_of(negative, history, past, mine[0])
        first = latents if chunk == 0 else None
        x = _sample_chunk(mine, taps, denoiser, (told, untold), generator(seed, chunk), first, callback)
        past = x if past is None else np.concatenate([past, x], axis=1)
        yield x


def _made(past: Latent, finest: Stage) -> int:
    """How many chunks latents are of."""
    channels, frames, *size = finest.latent
    made: int = past.shape[1] // frames
    floats(past, (channels, made * frames, *size), "latents of the first chunks [C, T, H, W]")
    return made


def _sample_chunk(
    steps: Sequence[StepPlan],
    taps: Taps,
    denoiser: Denoiser,
    conditions: tuple[Conditions, Conditions | None],
    noise: np.random.Generator,
    latents: Latent | None,
    callback: Callable[[Step], None] | None,
) -> Latent:
    """From noise to a latent of stage 0; conditions are those of the prompt and of the negative one."""
    x = initial_latent(steps, noise)
    if latents is not None:
        x = floats(latents, x.shape, "initial latents [C, T, H, W]")
    solver = steps[0].solver.start()
    for step in steps:
        velocity = guided_velocity(denoiser, step, x, *conditions)
        before, x = x, solver(step, x, velocity, noise)
        if callback is not None:
            callback(Step(step, velocity, x, before))
        if step.changes_stage:
            x = transition(taps, step, x, noise)
    return x
