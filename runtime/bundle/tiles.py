"""Decoding a large frame in fixed tiles: where they lie, and how their overlaps are blended."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["SMALLEST_TILE", "Tiles", "decode_tiled", "parse_tile"]

SMALLEST_TILE = 4
"""Height and width of the smallest tile, in latent pixels: a quarter of it overlaps."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tiles:
    """Tiles of one size over a latent frame.

    The last tile of an axis is shifted back so that all have one size; neighbours overlap by a quarter of a tile or
    more. The decoder's attention sees a tile alone, so that a tiled frame is close to an untiled one and not equal to
    it.
    """

    frame: tuple[int, int]
    """Height and width of a latent frame."""
    tile: tuple[int, int]
    """Height and width of a tile, in latent pixels."""
    spatial: int = 8
    """Pixels of a latent pixel, along an axis."""

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """First latent row of each row of tiles."""
        return _starts(self.frame[0], self.tile[0])

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """First latent column of each column of tiles."""
        return _starts(self.frame[1], self.tile[1])

    @property
    def count(self) -> int:
        """Tiles of a frame."""
        return len(self.rows) * len(self.columns)

    @property
    def overhead(self) -> float:
        """Latent pixels that are decoded, by those of the frame."""
        return self.count * self.tile[0] * self.tile[1] / (self.frame[0] * self.frame[1])

    def places(self) -> Iterator[tuple[slice, slice, Array]]:
        """Rows and columns of each tile in the latent frame, and the weight of its pixels [8h, 8w]; they sum to 1."""
        vertical, horizontal = (
            _weights(starts, tile, self.spatial)
            for starts, tile in zip((self.rows, self.columns), self.tile, strict=True)
        )
        for top, down in zip(self.rows, vertical, strict=True):
            for left, across in zip(self.columns, horizontal, strict=True):
                yield slice(top, top + self.tile[0]), slice(left, left + self.tile[1]), np.outer(down, across)


def parse_tile(text: str) -> tuple[int, int]:
    """A tile's height and width from "HEIGHTxWIDTH", in latent pixels.

    Raises:
        UsageError: it is malformed or too small.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and SMALLEST_TILE <= int(part) < 10**4 for part in parts):
        raise UsageError(
            f"a VAE tile is HEIGHTxWIDTH in latent pixels (an eighth of the frame's), each at least {SMALLEST_TILE}, "
            f"found '{text}'"
        )
    return int(parts[0]), int(parts[1])


def _starts(size: int, tile: int) -> tuple[int, ...]:
    overlap = tile // 4
    count = 1 if tile >= size else -(-(size - overlap) // (tile - overlap))
    return tuple(round(i * (size - tile) / max(1, count - 1)) for i in range(count))


def _weights(starts: tuple[int, ...], tile: int, spatial: int) -> list[Array]:
    """Per tile, its share of each pixel that it covers: linear ramps over the overlaps."""
    pixels = tile * spatial
    place = np.arange(pixels, dtype=np.float32) + np.float32(0.5)
    shares, total = [], np.zeros((starts[-1] + tile) * spatial, np.float32)
    for i, start in enumerate(starts):
        share = np.ones(pixels, np.float32)
        if i:
            share = np.minimum(share, place / ((starts[i - 1] + tile - start) * spatial))
        if i + 1 < len(starts):
            share = np.minimum(share, place[::-1] / ((start + tile - starts[i + 1]) * spatial))
        shares.append(share)
        total[start * spatial :][:pixels] += share
    return [share / total[start * spatial :][:pixels] for start, share in zip(starts, shares, strict=True)]


def decode_tiled(tiles: Tiles, latent: Array, decode: Callable[[Array], Iterator[Array]]) -> Iterator[Array]:
    """Decode a latent tile by tile; a frame is given when its last tile is decoded.

    Args:
        tiles: where tiles lie on the latent's frames.
        latent: [C, T, H, W].
        decode: a tile [C, T, h, w] to frames [n, 3, 8h, 8w], a few at a time, always in the same pieces.

    Yields:
        Frames [n, 3, 8H, 8W], in the pieces of `decode`.
    """
    pieces: list[Array] = []
    height, width = (n * tiles.spatial for n in tiles.frame)
    for number, (rows, columns, weight) in enumerate(tiles.places(), 1):
        window = tuple(slice(s.start * tiles.spatial, s.stop * tiles.spatial) for s in (rows, columns))
        for index, frames in enumerate(decode(latent[:, :, rows, columns])):
            if number == 1:
                pieces.append(np.zeros((len(frames), 3, height, width), np.float32))
            pieces[index][:, :, window[0], window[1]] += frames * weight
            if number == tiles.count:
                yield pieces[index]
                pieces[index] = np.empty(0, np.float32)
