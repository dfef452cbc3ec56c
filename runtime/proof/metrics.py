"""How far a result is from its reference."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["Distance", "distance", "finite", "psnr", "same_shape", "ssim", "worst"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Distance:
    """Distances of one array from another."""

    relative_l2: float
    max_abs: float
    cosine: float

    def to_json(self) -> dict[str, float]:
        """The distances as numbers; what is not finite becomes the largest number, so that JSON stays JSON."""
        return {name: finite(value) for name, value in vars(self).items()}


def finite(value: float) -> float:
    """The value, or a number larger than any error where it is not finite."""
    return value if math.isfinite(value) else 1e30


def distance(found: Array, reference: Array) -> Distance:
    """Distances in float64; a value that is not finite, on either side, counts as infinitely far.

    Raises:
        UsageError: the shapes differ.
    """
    same_shape(found, reference)
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Distance(math.inf, math.inf, 0.0)
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b))
    relative = error / norm_b if norm_b else (math.inf if error else 0.0)
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return Distance(relative, float(np.abs(a - b).max(initial=0.0)), cosine)


def same_shape(found: Array, reference: Array) -> None:
    """Refuse a reference of another shape.

    Raises:
        UsageError: it is one.
    """
    if found.shape != reference.shape:
        raise UsageError(
            f"the trace does not fit: expected a tensor of shape {list(found.shape)}, found {list(reference.shape)}"
        )


def worst(distances: list[Distance]) -> dict[str, float]:
    """The largest errors and the least cosine of several."""
    return {
        "relative_l2": finite(max(d.relative_l2 for d in distances)),
        "max_abs": finite(max(d.max_abs for d in distances)),
        "cosine": min(d.cosine for d in distances),
    }


def psnr(found: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio of 8-bit frames, in dB; 100 for equal ones."""
    error = float(((found.astype(np.float64) - reference) ** 2).mean())
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))


def ssim(found: Array, reference: Array, window: int = 8) -> float:
    """Mean structural similarity of 8-bit frames [T, H, W, 3], over blocks of 8x8 pixels (Wang et al. 2004)."""
    t, h, w, c = found.shape
    h, w = h - h % window, w - w % window

    def blocks(x: Array) -> Array:
        tiles = x[:, :h, :w].astype(np.float64).reshape(t, h // window, window, w // window, window, c)
        return tiles.transpose(0, 1, 3, 5, 2, 4).reshape(-1, window * window)

    a, b = blocks(found), blocks(reference)
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    covariance = (a * b).mean(-1) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((numerator / ((mean_a**2 + mean_b**2 + c1) * (a.var(-1) + b.var(-1) + c2))).mean())
