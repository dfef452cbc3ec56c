"""A clock of each stage's own: ρ, from 1 where a stage starts to 0 where it ends, whatever its noise levels are.

Pyramid-Flow (arXiv 2410.05954), and Helios after it, tell the network the time of this clock in place of a noise level,
and the network predicts d x / d ρ: the difference between where a stage starts and where it ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..documents import Fields, is_number
from ..errors import UsageError
from .levels import up

__all__ = ["SHIFTS", "Clock", "DynamicShift", "clock_times"]

TOP = 0.999
"""ρ of a first step: diffusers' table of 1000 noise levels starts short of 1."""

SLACK = 1e-6
"""What a timestep may be short of a whole number that it is: ρ goes through natural levels and back."""

SHIFTS = ("linear", "exponential")
"""How a μ becomes the factor of a shift: as it is, or e^μ."""


def clock_times(steps: int, *, without_last: bool = False) -> tuple[float, ...]:
    """ρ of a number of steps within a stage: evenly from 0.999 to 0.000999, as diffusers' `HeliosScheduler` has them.

    `without_last` spaces one more and leaves the last one out, as `HeliosDMDScheduler` does.
    """
    times = np.linspace(TOP, TOP / 1000, steps + without_last)[:steps]
    return tuple(float(rho) for rho in times)


@dataclass(frozen=True)
class DynamicShift:
    """The more tokens, the longer a stage stays near ρ = 1: `calculate_shift` and `time_shift` of diffusers.

    Tokens are those of the stage before, of the first stage its own: `HeliosPyramidPipeline` counts them before it
    takes the latent to the next scale.
    """

    form: str
    """One of `SHIFTS`."""
    tokens: tuple[int, int] = (256, 4096)
    shifts: tuple[float, float] = (0.5, 1.15)
    """μ at these numbers of tokens; on the line through them at others."""

    def __call__(self, rho: float, tokens: int) -> float:
        """ρ after a stage of so many tokens."""
        (few, many), (least, most) = self.tokens, self.shifts
        mu = least + (most - least) * (tokens - few) / (many - few)
        return up(math.exp(mu) if self.form == "exponential" else mu, rho)

    def to_json(self) -> dict[str, Any]:
        """Its part of the document that `Clock.from_json` reads."""
        return {"form": self.form, "tokens": list(self.tokens), "shifts": list(self.shifts)}

    @classmethod
    def from_json(cls, document: Any, source: str) -> "DynamicShift":
        """Read it.

        Raises:
            UsageError: a field is missing, unknown or impossible.
        """
        fields = Fields(document, source)
        fields.only(("form", "tokens", "shifts"))
        tokens, shifts = fields.numbers("tokens"), fields.numbers("shifts")
        if len(tokens) != 2 or not 0 < tokens[0] < tokens[1]:
            raise fields.wrong("tokens", "two increasing numbers")
        if len(shifts) != 2 or not 0 < shifts[0] <= shifts[1] <= 100:
            raise fields.wrong("shifts", "two numbers that don't decrease, up to 100")
        few, many = map(int, tokens)
        return cls(fields.text("form", choices=SHIFTS), (few, many), (shifts[0], shifts[1]))


@dataclass(frozen=True)
class Clock:
    """What the network is told of ρ in each stage."""

    timesteps: tuple[tuple[float, float], ...]
    """Of each stage, finest first: the timestep at ρ = 1 and at ρ = 0."""
    whole: bool = True
    """Timesteps are cut to whole numbers, as diffusers' pipelines of Helios do."""
    shift: DynamicShift | None = None
    """Moves the ρ of schedules, by numbers of tokens."""

    def timestep(self, stage: int, rho: float) -> float:
        """What the network is told."""
        first, last = self.timesteps[stage]
        exact = last + (first - last) * rho
        return float(math.floor(exact + SLACK)) if self.whole else exact

    def shifted(self, rho: float, tokens: int) -> float:
        """ρ of a schedule, after a stage of so many tokens."""
        return rho if self.shift is None else self.shift(rho, tokens)

    @classmethod
    def from_json(cls, document: Any, depth: int, source: str) -> "Clock":
        """Read the field `clock` of a model of `depth` stages.

        Raises:
            UsageError: a field is missing, unknown or impossible.
        """
        fields = Fields(document, source)
        fields.only(("timesteps", "whole", "dynamic_shift"))

        def are_ends(value: Any) -> bool:
            pairs = isinstance(value, list) and len(value) == depth and all(map(_is_pair, value))
            return pairs and all(0 <= last < first <= 1000 for first, last in value)

        expected = f"timesteps [first, last], decreasing, from 0 to 1000, of each of {depth} stages, finest first"
        ends: Sequence[Sequence[float]] = fields.get("timesteps", expected, are_ends)
        whole = fields.get("whole", "true or false", lambda value: isinstance(value, bool), True)
        shift = fields.document.get("dynamic_shift")
        return cls(
            tuple((float(first), float(last)) for first, last in ends),
            whole,
            None if shift is None else DynamicShift.from_json(shift, f"{source}: dynamic_shift"),
        )

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        shift = {} if self.shift is None else {"dynamic_shift": self.shift.to_json()}
        return {"timesteps": [list(ends) for ends in self.timesteps], "whole": self.whole, **shift}

    def check(self, depth: int) -> None:
        """Refuse a clock of another number of stages.

        Raises:
            UsageError: it is one.
        """
        if len(self.timesteps) != depth:
            raise UsageError(f"a clock has timesteps for each of {depth} stages, found {len(self.timesteps)}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
