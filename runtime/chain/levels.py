"""Noise levels: the map between a scale's global level and the natural level (supplement eq. 7 and 17).

All levels are float64 and never rounded: the printed 0.5858 lies above 2 - sqrt(2), the printed 0.9412 above
16/17, so a printed level can fall into another stage than the exact one.
"""

import math

__all__ = ["default_clean_levels", "down", "gain", "up"]


def gain(axes: int) -> float:
    """The scaling constant ω of supplement eq. 1: (sum of the low-pass taps)^(number of halved axes).

    Orthonormal low-pass taps sum to sqrt(2), whatever the wavelet: 2·sqrt(2) for three axes, 2 for two.
    """
    return math.sqrt(2.0**axes)


def up(k: float, sigma: float) -> float:
    """Level of the same noise one scale finer, for gain `k`: k·sigma / (1 + (k-1)·sigma) (eq. 7).

    With `k` the product of the gains of i scales it gives the natural level of a global level at scale i
    (eq. 17). The timestep shift of flow models is the same function: shift 5 is `up(5, sigma)`.
    """
    return k * sigma / (1 + (k - 1) * sigma)


def down(k: float, level: float) -> float:
    """Inverse of `up`: level / (k - (k-1)·level)."""
    return level / (k - (k - 1) * level)


def default_clean_levels(stages: int, gain: float) -> tuple[float, ...]:
    """Cleanest natural level of each stage, finest first: `up(gain^i, i/stages)`, the first one 0.

    `gain` is that of the group which halves most axes. Three stages halving T, H and W give 0, 2 - sqrt(2)
    and 16/17, the levels of PyramidalWan (supplement A3).
    """
    return tuple(up(gain**i, i / stages) for i in range(stages))
