"""How frames are cut into tiles, where nothing else is asked for."""

import math
from collections.abc import Callable, Sequence

from ...runtime.bundle.tiles import Tiles
from ...runtime.chain.pyramid import Resolution
from ...runtime.model.checkpoint import Checkpoint

__all__ = ["Tile", "choose_tiles", "frame_of"]

VAE_BUDGET = 2_300_000_000
"""Memory that decoding may take before frames are cut into tiles, in bytes: a sample then stays below 2.5 GB."""

# Fitted to ONNX Runtime's plans of Wan2.1's decoder at 448x832, tiles of 364 to 2,288 latent pixels (1 %).
DECODER_BASE = 10_000_000
"""What a decoder takes whatever its tile, in bytes."""

ACTIVATIONS, CACHES = 2.575, 0.684
"""What it takes by the bytes of its caches in float32: for all else, and for the caches as they are kept."""

LEAST_CHOSEN = 16
"""Height and width of the smallest tile that is chosen: its overlaps are 4 latent pixels wide, 32 of the video."""

Frame = tuple[int, int]
"""Height and width of a latent frame."""

Tile = tuple[int, int] | None
"""Height and width in latent pixels; None: frames are decoded whole."""


def frame_of(checkpoint: Checkpoint, resolution: Resolution) -> Frame:
    """Height and width of a latent frame."""
    _, _, height, width = checkpoint.model.stages(resolution)[0].latent
    return height, width


def choose_tiles(checkpoint: Checkpoint, frames: Sequence[Frame], caches: str = "fp32") -> tuple[Tile, ...]:
    """The tile of each frame: None if its decoding fits `VAE_BUDGET` whole, and one for all others.

    It is the one that costs the least beyond the frames and fits the budget; the others share it, since each tile is a
    pair of graphs. Thin strips would cost even less, but show a pixel near their edge little of what is around it.
    """
    estimate = _estimate(checkpoint, caches)
    cut = [frame for frame in frames if estimate(*frame) > VAE_BUDGET]
    shared = _cheapest(cut, estimate) if cut else None
    return tuple(shared if frame in cut else None for frame in frames)


def _estimate(checkpoint: Checkpoint, caches: str) -> Callable[[int, int], float]:
    """Bytes that decoding a tile takes, of its height and width."""
    (decoder,) = (config for config in checkpoint.model.decoders.values() if config.cut)
    shapes = decoder.cache_shapes(LEAST_CHOSEN, LEAST_CHOSEN)
    per_pixel = 4 * sum(math.prod(shape) for shape in shapes) / LEAST_CHOSEN**2
    kept = 0.5 if caches == "fp16" else 1.0

    def estimate(height: int, width: int) -> float:
        pixels = height * width
        # The decoder's attention, near its start, holds its scores and their softmax beside the old caches.
        step = max((ACTIVATIONS + CACHES * kept) * per_pixel * pixels, kept * per_pixel * pixels + 2 * 4 * pixels**2)
        return DECODER_BASE + step

    return estimate


def _cheapest(frames: Sequence[Frame], estimate: Callable[[int, int], float]) -> Frame:
    least = [min(sizes) for sizes in zip(*frames, strict=True)]
    sizes = [
        sorted(
            {tile for frame in frames for count in range(1, 65) if (tile := _cover(frame[axis], count)) <= least[axis]}
        )
        for axis in (0, 1)
    ]
    fitting = [(height, width) for height in sizes[0] for width in sizes[1] if estimate(height, width) <= VAE_BUDGET]

    def cost(tile: Frame) -> tuple[float, int]:
        plans = [Tiles(frame, tile) for frame in frames]
        return sum(plan.overhead for plan in plans), sum(plan.count for plan in plans)

    return min(fitting, key=cost) if fitting else (sizes[0][0], sizes[1][0])


def _cover(size: int, count: int) -> int:
    """The smallest tile of which `count`, overlapping by a quarter, cover a length."""
    return next(
        tile
        for tile in range(min(LEAST_CHOSEN, size), size + 1)
        if len(Tiles((size, size), (tile, tile)).rows) <= count
    )
