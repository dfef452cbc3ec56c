"""UniPC: a predictor from remembered clean latents, corrected when the next velocity is known.

Zhao et al. 2023 (arXiv 2302.04867), data prediction, for flow models: α = 1 - σ, λ = log(α/σ), x0 = x - σ·v. Each frame
group has its own σ. The history is that of a stage: the latents of another stage are others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .plan import StepPlan

__all__ = ["NEAR_NOISE", "UniPC"]

Latent = NDArray[Any]

NEAR_NOISE = 1e-6
"""What σ = 1 is short of, where its logarithm would be infinite: as diffusers' UniPCMultistepScheduler has it."""


@dataclass(frozen=True)
class _Known:
    """A step that was evaluated: σ of each frame group, and the clean latent that its velocity says."""

    sigmas: tuple[float, ...]
    clean: Latent


class UniPC:
    """The solver of one run."""

    def __init__(self, order: int = 2, variant: str = "bh2", lower_order_final: bool = True) -> None:
        """UniPC of an order from 1 to 3 with B(h) = h ("bh1") or e^h - 1 ("bh2").

        With `lower_order_final` the last steps of a stage are of lower order, the very last one of the first.
        """
        self.order, self.variant, self.lower_order_final = order, variant, lower_order_final
        self._start()

    def _start(self) -> None:
        self._known: list[_Known] = []
        self._corrected: Latent | None = None
        """What the last predictor started from."""
        self._used = 0
        """Order of the last predictor."""

    def __call__(self, step: "StepPlan", latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
        """The latent [C, T, H, W] after a step."""
        if step.position == 0:
            self._start()
        sigmas = tuple(_kept(sigma) for sigma, _ in step.sigmas)
        clean = np.empty_like(latent)
        for group, sigma in zip(step.stage.groups, sigmas, strict=True):
            clean[:, group.frames] = latent[:, group.frames] - latent.dtype.type(sigma) * velocity[:, group.frames]
        here = _Known(sigmas, clean)
        if self._corrected is not None:
            latent = self._integrate(step, self._corrected, self._known, sigmas, self._used, here)
        self._known = [*self._known, here][-self.order :]
        left = step.steps_of_stage - step.position
        wanted = min(self.order, left) if self.lower_order_final else self.order
        after = tuple(_kept(after) for _, after in step.sigmas)
        self._used, self._corrected = 1 if min(after) == 0 else min(wanted, len(self._known)), latent
        return self._integrate(step, latent, self._known, after, self._used)

    def _integrate(
        self,
        step: "StepPlan",
        start: Latent,
        known: Sequence[_Known],
        after: tuple[float, ...],
        order: int,
        there: _Known | None = None,
    ) -> Latent:
        """From the last known level to another, in each frame group; corrected by what is known there (UniC, UniP)."""
        out = np.empty_like(start)
        for index, group in enumerate(step.stage.groups):
            frames = group.frames
            history = [(entry.sigmas[index], entry.clean[:, frames]) for entry in reversed(known)][:order]
            target = None if there is None else there.clean[:, frames]
            out[:, frames] = _update(start[:, frames], history, after[index], target, self.variant)
        return out


def _update(
    start: Latent, history: list[tuple[float, Latent]], after: float, target: Latent | None, variant: str
) -> Latent:
    """The update of one frame group (eq. 3 and 8 of the paper, data prediction).

    Args:
        start: at the last known level.
        history: σ and clean latent of the known steps, the last one first; as many as the order.
        after: σ to integrate to.
        target: clean latent there, for the corrector.
        variant: "bh1" or "bh2".
    """
    (sigma, clean), *earlier = history
    h = _half_log_snr(after) - _half_log_snr(sigma)
    ratios = [(_half_log_snr(s) - _half_log_snr(sigma)) / h for s, _ in earlier]
    differences = [(x0 - clean) * _of(start, 1 / ratio) for ratio, (_, x0) in zip(ratios, earlier, strict=True)]
    if target is not None:
        ratios, differences = [*ratios, 1.0], [*differences, target - clean]
    growth = math.expm1(-h)
    out: Latent = _of(start, after / sigma) * start - _of(start, (1 - after) * growth) * clean
    scale = (1 - after) * (-h if variant == "bh1" else growth)
    for weight, difference in zip(_weights(ratios, h, variant), differences, strict=True):
        out = out - _of(start, scale * weight) * difference
    return out


def _weights(ratios: list[float], h: float, variant: str) -> list[float]:
    """The coefficients that match the first terms of the exponential integral's expansion; one alone is 1/2."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    hh = -h
    scale = hh if variant == "bh1" else math.expm1(hh)
    phi, factorial, matched = math.expm1(hh) / hh - 1, 1, []
    for power in range(1, len(ratios) + 1):
        matched.append(phi * factorial / scale)
        factorial *= power + 1
        phi = phi / hh - 1 / factorial
    powers = np.vander(np.array(ratios), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(matched))]


def _kept(sigma: float) -> float:
    """σ as diffusers keeps it: short of 1, and in float32, whose rounding shows in log(1 - σ) there."""
    return float(np.float32(min(sigma, 1 - NEAR_NOISE)))


def _half_log_snr(sigma: float) -> float:
    """λ = log(α/σ), half the logarithm of the signal-to-noise ratio."""
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


def _of(like: Latent, value: float) -> Any:
    """A number of an array's own type, so that the array keeps it."""
    return like.dtype.type(value)
