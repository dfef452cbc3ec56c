"""Moving to a finer scale: up with renoising (supplement eq. 16)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .levels import gain
from .noise import standard_normal
from .wavelets import Array, Bands, Taps, high_bands, synthesise

__all__ = ["draw_high_bands", "renoise_with", "upsample_and_renoise"]


def renoise_with(x: Array, high: Bands, sigma: float, taps: Taps, axes: Sequence[int]) -> Array:
    """R↑_N(x) = ω / (1 + (ω-1)σ) · Wᵀ(x; σ·z) (eq. 16) for given high bands z.

    For x at global level σ the result has global level `up(ω, σ)`: the natural level stays.
    """
    omega = gain(len(axes))
    bands = {"0" * len(axes): x} | {key: band * sigma for key, band in high.items()}
    return synthesise(bands, taps, axes) * (omega / (1 + (omega - 1) * sigma))


def draw_high_bands(generator: np.random.Generator, shape: Sequence[int], axes: int) -> dict[str, NDArray[np.float32]]:
    """N(0, I) in every high band, each of the given shape, drawn in binary order."""
    return {key: standard_normal(generator, shape) for key in high_bands(axes)}


def upsample_and_renoise(
    x: Array, sigma: float, taps: Taps, axes: Sequence[int], generator: np.random.Generator
) -> Array:
    """R↑_N(x) with high bands drawn from the generator."""
    return renoise_with(x, draw_high_bands(generator, x.shape, len(axes)), sigma, taps, axes)
