"""Previews while a sample is made: what latents are about to become, after each step."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..chain.sampler import Step
from ..errors import UsageError
from ..model.preview import Preview, PreviewMap
from .decoder import decode, frames_from
from .graphs import OpenGraphs

__all__ = ["clean_latent", "decoded_preview", "mapped_preview", "preview_map", "previewer", "showing"]

Array = NDArray[np.float32]

Previewer = Callable[[Step], Preview | None]
"""What is to be shown after a step, if anything."""


def clean_latent(step: Step) -> Array:
    """What a step says of the clean latent: x0 = x - σ·v in each frame group, at the scale of its stage.

    Where a velocity is the derivative by another time than σ, a stage's clock, it is taken to σ first.
    """
    out, plan = np.empty_like(step.latent), step.plan
    for group, (time_, after) in zip(plan.stage.groups, plan.sigmas, strict=True):
        sigma, next_sigma = (group.global_level(plan.stage.index, level) for level in (plan.level, plan.next_level))
        by_sigma = sigma * (after - time_) / (next_sigma - sigma)
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


def mapped_preview(found: PreviewMap) -> Previewer:
    """Every step as all frames of its latent, a pixel for each latent pixel."""
    return lambda step: found.show(clean_latent(step))


def decoded_preview(decode: Callable[[Array], Iterator[Array]], finest: tuple[int, int]) -> Previewer:
    """The last step of each stage as the first frame of the video, decoded.

    Args:
        decode: a latent [C, 1, h, w] of the finest stage's size to frames [1, 3, H, W] in -1 … 1.
        finest: that size, height and width; what a coarser stage makes is enlarged to it, each pixel repeated.
    """

    def preview(step: Step) -> Preview | None:
        if step.plan.position + 1 < step.plan.steps_of_stage:
            return None
        latent = clean_latent(step)[:, :1]
        for axis, size in zip((2, 3), finest, strict=True):
            latent = latent.repeat(size // latent.shape[axis], axis)
        return np.concatenate([frames_from(frames) for frames in decode(latent)])

    return preview


def previewer(graphs: OpenGraphs, decoder: str | None) -> Previewer:
    """What shows the steps of a bundle: its map, or one of its decoders, whose cost is added to its timings.

    Raises:
        UsageError: it has no map, or no such decoder.
    """
    manifest = graphs.bundle.manifest
    if decoder is None:
        return mapped_preview(preview_map(manifest.preview, graphs.bundle.folder))
    used = manifest.decoding(decoder).decoder
    _, _, *finest = manifest.stages[0].latent

    def decoded(latent: Array) -> Iterator[Array]:
        start = time.perf_counter()
        yield from decode(graphs, latent, used)
        graphs.timings.preview += time.perf_counter() - start

    return decoded_preview(decoded, (finest[0], finest[1]))


def showing(
    show: Callable[[Preview], None] | None,
    preview: Callable[[], Previewer],
    then: Callable[[Step], None] | None = None,
) -> Callable[[Step], None] | None:
    """A callback of the chain that shows steps, if asked to, and calls another one after it.

    Args:
        show: given what is to be shown; None: nothing is.
        preview: makes what says what is to be shown; it may raise a UsageError.
        then: called after each step.
    """
    if show is None:
        return then
    previewed = preview()

    def callback(step: Step) -> None:
        shown = previewed(step)
        if shown is not None:
            show(shown)
        if then is not None:
            then(step)

    return callback
