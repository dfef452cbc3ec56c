"""The format's noise: one Philox generator per sample, float32 draws in a fixed order.

The order is part of the format, because seeds depend on it: the initial latent in one draw, then per transition
and per frame group the high bands in binary order (`resample.up_and_renoise`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["generator", "standard_normal"]


def generator(seed: int) -> np.random.Generator:
    """The generator of one sample.

    Raises:
        UsageError: the seed is negative, or not a whole number.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed!r}")
    return np.random.Generator(np.random.Philox(int(seed)))


def standard_normal(generator: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """One draw of independent N(0, 1) values, float32."""
    return generator.standard_normal(tuple(shape), dtype=np.float32)
