"""Videos in chunks: how many there are, and their frames one chunk after the other, each decoded alone."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..chain.pyramid import Geometry, Resolution
from ..errors import UsageError
from ..model.description import Model
from .decoder import frames_from, require_finite
from .timings import Timings

__all__ = ["MOST_CHUNKS", "chunk_count", "collect", "decode_chunks", "frame_count", "split", "timed"]

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
    if isinstance(asked, bool) or not isinstance(asked, int | np.integer) or asked < 1:
        raise UsageError(f"chunks and frames are whole numbers from 1, found {asked!r:.40}")
    asked = int(asked)
    count = asked if frames is None else -(-asked // resolution.frames)
    if count > MOST_CHUNKS:
        raise UsageError(f"a video has at most {MOST_CHUNKS} chunks, found {count}")
    return count


def frame_count(chunks: int, resolution: Resolution, geometry: Geometry) -> int:
    """Frames of a video of so many chunks: as `HeliosPyramidPipeline`, which cuts them to those of a latent."""
    return (chunks * resolution.frames - 1) // geometry.temporal * geometry.temporal + 1


def split(latent: Array, model: Model, resolution: Resolution) -> list[Array]:
    """The latent of each chunk of a video's latent [C, T, H, W]; itself alone, of a model that makes videos whole.

    Raises:
        UsageError: it is not of whole chunks.
    """
    if model.family.history is None:
        return [latent]
    frames = model.pyramid.geometry.latent_frames(resolution.frames)
    chunks, left = divmod(latent.shape[1], frames)
    if not chunks or left:
        raise UsageError(f"expected latents of whole chunks of {frames} latent frames, found {latent.shape[1]}")
    return np.split(latent, chunks, axis=1)


def decode_chunks(
    chunks: Iterable[Array],
    count: int,
    model: Model,
    resolution: Resolution,
    decode: Callable[[Array], Iterator[Array]],
) -> Iterator[Array]:
    """Frames [n, 3, H, W] of chunks [C, T, H, W] as they come, each decoded alone.

    Args:
        chunks: the latents.
        count: how many there will be.
        model: that they are of.
        resolution: of a chunk.
        decode: a chunk's latent to its frames, some at a time.
    """
    left = frame_count(count, resolution, model.pyramid.geometry)
    for chunk in chunks:
        for frames in decode(chunk):
            if count == 1:
                yield frames
            elif left > 0:
                yield frames[:left]
            left -= len(frames)


def timed(chunks: Iterator[Array], timings: Timings) -> Iterator[Array]:
    """The latents of a chain's chunks as they come; what each takes is added to the timings.

    Raises:
        CheckFailed: one is not finite.
    """
    while True:
        load, engines, start = timings.load, sum(timings.engine.values()), time.perf_counter()
        chunk = next(chunks, None)
        timings.denoise += time.perf_counter() - start
        timings.chain_load += timings.load - load
        timings.chain_engines += sum(timings.engine.values()) - engines
        if chunk is None:
            return
        require_finite(chunk, "the latents of this run")
        yield chunk


def collect(
    chunks: Iterable[Array],
    made: list[Array],
    decode: Callable[[Iterable[Array]], Iterator[Array]],
    wanted: bool,
    on_frames: Callable[[NDArray[np.uint8]], None] | None,
) -> NDArray[np.uint8] | None:
    """Take chunks as they come, and decode each before the next is made.

    Args:
        chunks: their latents.
        made: a list that they are added to.
        decode: chunks to frames [n, 3, H, W] in -1 … 1.
        wanted: whether there are to be frames.
        on_frames: given frames [n, H, W, 3], uint8, as they come; None: they are kept.

    Returns:
        All frames; None where they are not wanted, or given away.
    """

    def kept() -> Iterator[Array]:
        for chunk in chunks:
            made.append(chunk)
            yield chunk

    if not wanted:
        made.extend(chunks)
        return None
    pieces = (frames_from(frames) for frames in decode(kept()))
    if on_frames is None:
        return np.concatenate(list(pieces))
    for piece in pieces:
        on_frames(piece)
    return None
