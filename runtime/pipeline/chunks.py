"""Videos in chunks: how many there are, and their frames one chunk after the other, each decoded alone."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..chain.pyramid import Geometry, Resolution
from ..errors import UsageError
from ..model.description import Model

__all__ = ["MOST_CHUNKS", "chunk_count", "decode_chunks", "frame_count"]

Array = NDArray[np.float32]

MOST_CHUNKS = 10_000
"""Of a video: more is a mistake."""


def chunk_count(model: Model, resolution: Resolution, chunks: int | None, frames: int | None) -> int:
    """Chunks of a video: a number of them, or as many as hold a number of frames; one where neither is given.

    Args:
        model: what makes it.
        resolution: of a chunk.
        chunks, frames: what is asked for.

    Raises:
        UsageError: both are given, one is no such number, or the model makes videos whole.
    """
    if chunks is None and frames is None:
        return 1
    if model.family.history is None:
        raise UsageError(f"a model of the family {model.family.name} makes videos whole: leave out chunks and frames")
    if chunks is not None and frames is not None:
        raise UsageError("give either chunks or frames")
    asked = chunks if frames is None else frames
    if type(asked) is not int or asked < 1:
        raise UsageError(f"chunks and frames are whole numbers from 1, found {asked!r:.40}")
    count = asked if frames is None else -(-asked // resolution.frames)
    if count > MOST_CHUNKS:
        raise UsageError(f"a video has at most {MOST_CHUNKS} chunks, found {count}")
    return count


def frame_count(chunks: int, resolution: Resolution, geometry: Geometry) -> int:
    """Frames of a video of so many chunks: as `HeliosPyramidPipeline`, which cuts them to those of a latent."""
    return (chunks * resolution.frames - 1) // geometry.temporal * geometry.temporal + 1


def decode_chunks(
    latent: Array, model: Model, resolution: Resolution, decode: Callable[[Array], Iterator[Array]]
) -> Iterator[Array]:
    """Frames [n, 3, H, W] of a latent [C, T, H, W] of one chunk or more, each decoded alone."""
    geometry = model.pyramid.geometry
    count = latent.shape[1] // geometry.latent_frames(resolution.frames)
    left = frame_count(count, resolution, geometry)
    for chunk in np.split(latent, count, axis=1):
        for frames in decode(chunk):
            yield frames[:left]
            left -= len(frames)
            if left <= 0:
                return
