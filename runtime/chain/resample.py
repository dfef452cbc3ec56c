"""Moving between scales: down, up, and up with renoising (supplement eq. 1, 15 and 16)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .levels import gain
from .noise import standard_normal
from .wavelets import Array, Bands, Taps, analyse, high_bands, synthesise

__all__ = ["downsample", "draw_high_bands", "renoise_with", "upsample", "upsample_and_renoise"]


def downsample(x: Array, taps: Taps, axes: Sequence[int]) -> Array:
    """R↓(x) = U x / ω (eq. 1), the given axes halved; for Haar the average pooling."""
    return analyse(x, taps, axes)["0" * len(axes)] * (1 / gain(len(axes)))


def upsample(x: Array, taps: Taps, axes: Sequence[int]) -> Array:
    """R↑(x) = ω·Wᵀ(x; 0) (eq. 15), the given axes doubled; for Haar nearest neighbour. R↓R↑ = I."""
    return synthesise({"0" * len(axes): x}, taps, axes) * gain(len(axes))


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
