"""Sinusoidal features of a timestep, made on the host: a graph of reduced precision would lose its digits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["timestep_features"]


def timestep_features(timestep: float, frequencies: Sequence[float]) -> NDArray[np.float32]:
    """cos and sin of t·f for each frequency, cosines first: [1, 2·frequencies], float32.

    The frequencies come with the bundle, as diffusers' `get_timestep_embedding` rounds them in float32: a unit in
    the last place of one is 5e-5 in the phase of t = 1000.
    """
    phase = np.float32(timestep) * np.asarray(frequencies, np.float32)
    return np.concatenate([np.cos(phase), np.sin(phase)])[None]
