"""Chunks: a video that is made piece by piece, each told of the latents before it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["HISTORY", "History"]

HISTORY = "history"
"""The condition, and the input of a stage's graph, that a history is."""

Latent = NDArray[np.float32]


@dataclass(frozen=True)
class History:
    """What a chunk is told of those before it: the first latent frame of all, then the last ones, in order of time."""

    recent: int
    """How many of the last ones."""

    @property
    def frames(self) -> int:
        """Latent frames of a history."""
        return 1 + self.recent

    def of(self, past: Latent | None, latent: tuple[int, int, int, int]) -> Latent:
        """The history [C, frames, H, W] of a chunk; zeros where nothing is yet.

        Args:
            past: all latents before it [C, T, H, W], finest stage; None before the first chunk.
            latent: shape of a chunk's latent in the finest stage.
        """
        channels, _, height, width = latent
        out = np.zeros((channels, self.frames, height, width), np.float32)
        if past is not None:
            out[:, :1] = past[:, :1]
            last = past[:, -self.recent :]
            out[:, self.frames - last.shape[1] :] = last
        return out
