"""The format's noise: one Philox generator per sample, float32 draws in a fixed order.

The order is part of the format, because seeds depend on it: the initial latent in one draw, then per transition
and per frame group the high bands in binary order (`resample.up_and_renoise`). Each chunk of a video that is made in
chunks has a stream of its own, so that one does not depend on how many draws those before it made.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["generator", "standard_normal"]


def generator(seed: int, chunk: int = 0) -> np.random.Generator:
    """The generator of one sample: of a later chunk, as many jumps of 2^128 draws ahead.

    Raises:
        UsageError: the seed is negative, or not a whole number.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed!r}")
    stream = np.random.Philox(int(seed))
    return np.random.Generator(stream.jumped(chunk) if chunk else stream)


def standard_normal(generator: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """One draw of independent N(0, 1) values, float32."""
    return generator.standard_normal(tuple(shape), dtype=np.float32)
