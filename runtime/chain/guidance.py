"""Guidance: one velocity from that of a prompt and that of a negative one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSIFIER_FREE", "GUIDANCES", "PLAIN_GUIDANCE", "Guidance", "classifier_free", "zero_star"]

Velocity = NDArray[np.float32]


def classifier_free(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """v_uncond + s·(v_cond - v_uncond)."""
    return unconditional + np.float32(scale) * (conditional - unconditional)


def zero_star(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance from a·v_uncond, the multiple that is nearest to v_cond (CFG-Zero*, arXiv 2503.18886).

    a = <v_cond, v_uncond> / (|v_uncond|² + 1e-8).
    """
    one, other = (values.astype(np.float64).ravel() for values in (conditional, unconditional))
    nearest = np.float32(one @ other / (other @ other + 1e-8)) * unconditional
    return classifier_free(conditional, nearest, scale)


CLASSIFIER_FREE = "classifier-free"

GUIDANCES: Mapping[str, Callable[[Velocity, Velocity, float], Velocity]] = {
    CLASSIFIER_FREE: classifier_free,
    "zero-star": zero_star,
}
"""By name."""


@dataclass(frozen=True)
class Guidance:
    """How a schedule is guided, where it is."""

    name: str = CLASSIFIER_FREE
    """One of `GUIDANCES`."""
    zeroed_steps: int = 0
    """First steps of the coarsest stage whose velocity is zero, whatever the network would say (CFG-Zero*)."""


PLAIN_GUIDANCE = Guidance()
