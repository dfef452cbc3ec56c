"""Solvers: from a latent and its velocity to the latent at the step's next level."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .plan import StepPlan

__all__ = ["SOLVERS", "Solver", "euler"]

Latent = NDArray[np.float32]


class Solver(Protocol):
    """Takes the steps of one run, in order; it may remember what it has seen."""

    def __call__(self, step: StepPlan, latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
        """The latent [C, T, H, W] after a step, float32; `noise` is the run's own generator."""
        ...


def euler(step: StepPlan, latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
    """x + (σ' - σ)·v in each frame group, where σ is the group's global level at this scale."""
    out = np.empty_like(latent)
    for group, (sigma, after) in zip(step.stage.groups, step.sigmas, strict=True):
        out[:, group.frames] = latent[:, group.frames] + np.float32(after - sigma) * velocity[:, group.frames]
    return out


SOLVERS: Mapping[str, Callable[[], Solver]] = {"euler": lambda: euler}
"""What makes the solver of a run, by the solver's name."""
