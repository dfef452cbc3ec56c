"""Schedules: the natural levels at which each stage is evaluated, by the rule or explicit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import UsageError
from .guidance import PLAIN_GUIDANCE, Guidance
from .levels import down, up
from .pyramid import Pyramid
from .solvers import EULER, SolverChoice

__all__ = [
    "MAX_GUIDANCE",
    "SNAP",
    "SPACINGS",
    "Schedule",
    "explicit_levels",
    "parse_levels",
    "parse_steps",
    "spaced_levels",
]

Levels = tuple[tuple[float, ...], ...]
"""Per stage in the order of sampling (coarsest first): natural levels, decreasing, the first one ς_n."""

MAX_GUIDANCE = 100.0
"""Largest guidance scale that is not a mistake."""

SNAP = 1e-4
"""A first level this close to ς_n is ς_n: printed levels have four decimals."""


@dataclass(frozen=True)
class Schedule:
    """Levels of a sampling run, and the guidance that they were chosen with."""

    name: str
    levels: Levels
    guidance_scale: float = 1.0
    solver: SolverChoice = EULER
    scaled_start: bool = False
    """The run starts from σ_0·ε, at a first level below 1, in place of pure noise."""
    guidance_scale_2: float | None = None
    """Of the second network, of a model of two; None: as the first one's."""
    guidance: Guidance = PLAIN_GUIDANCE
    first_chunk: Levels = ()
    """Levels of the first chunk, where it has others than those after it."""

    def levels_of(self, chunk: int) -> Levels:
        """Levels of a chunk."""
        return self.first_chunk if chunk == 0 and self.first_chunk else self.levels

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps per stage, coarsest first."""
        return tuple(map(len, self.levels))

    @property
    def words(self) -> str:
        """Its name, and the steps of the first chunk where it has others."""
        first = "-".join(str(len(group)) for group in self.first_chunk)
        return f"{self.name} (first chunk {first})" if first else self.name

    def guidance_of(self, expert: int) -> float:
        """The scale that a network is guided with; that of the first one says whether any is (as diffusers)."""
        own = self.guidance_scale_2
        return own if expert and own is not None and self.guided else self.guidance_scale

    @property
    def guided(self) -> bool:
        """Whether each step evaluates the negative prompt too (as diffusers: scale above 1)."""
        return self.guidance_scale > 1


def spaced_levels(pyramid: Pyramid, steps: Sequence[int], shift: float = 5.0, solver: SolverChoice = EULER) -> Levels:
    """Levels of a number of steps for each stage, by the rule of the model's kind; see `SPACINGS`.

    Args:
        pyramid: the model.
        steps: steps per stage, coarsest first, at least one each.
        shift: timestep shift.
        solver: whose scheduler a model follows that follows one.

    Raises:
        UsageError: the number of stages differs, or a stage has no step.
    """
    if len(steps) != pyramid.depth or any(n < 1 for n in steps):
        raise UsageError(
            f"a schedule has at least one step for each of the {pyramid.depth} stage(s), coarsest first; "
            f"found {'-'.join(map(str, steps))}"
        )
    if not 0.01 <= shift <= 1000:
        raise UsageError(f"the shift of a schedule lies within 0.01 … 1000, found {shift:g}")
    return SPACINGS[pyramid.kind.spacing](pyramid, steps, shift, solver)


def _stage_spacing(pyramid: Pyramid, steps: Sequence[int], shift: float, solver: SolverChoice) -> Levels:
    """Uniform steps between the un-shifted global boundaries of each stage.

    With k = shift·ω^i: `t = linspace(down_k(ς_n), down_k(ς_c), n+1)[:-1]`, `ς = up_k(t)`. It reproduces the
    levels of PyramidalWan's 2-2-1 schedule (supplement A3).
    """
    levels = []
    for index, n in zip(reversed(range(pyramid.depth)), steps, strict=True):
        noisy, clean = pyramid.bounds(index)
        k = shift * pyramid.schedule_gain**index
        start, stop = down(k, noisy), down(k, clean)
        levels.append((noisy, *(up(k, start + (stop - start) * j / n) for j in range(1, n))))
    return tuple(levels)


def _sigma_spacing(pyramid: Pyramid, steps: Sequence[int], shift: float, solver: SolverChoice) -> Levels:
    """Sigmas of `set_timesteps(n)` of the solver's scheduler in diffusers, as users of plain models expect."""
    return (solver.facts.sigmas(steps[0], shift),)


def _clock_spacing(pyramid: Pyramid, steps: Sequence[int], shift: float, solver: SolverChoice) -> Levels:
    """Natural levels of the solver's ρ in each stage; the clock has a shift of its own, and not that of a schedule."""
    return tuple(
        tuple(pyramid.level(index, rho) for rho in solver.facts.times(n))
        for index, n in zip(reversed(range(pyramid.depth)), steps, strict=True)
    )


SPACINGS: Mapping[str, Callable[[Pyramid, Sequence[int], float, SolverChoice], Levels]] = {
    "stages": _stage_spacing,
    "sigmas": _sigma_spacing,
    "clocks": _clock_spacing,
}
"""The rules that space levels, by name."""


def explicit_levels(pyramid: Pyramid, levels: Sequence[Sequence[float]], *, scaled_start: bool = False) -> Levels:
    """Validated levels, per stage, coarsest first. The first of a stage is ς_n, and may be left out.

    With a scaled start the first of all is where the run begins, and is there; where stages have clocks, the first of
    each is what it says.

    Raises:
        UsageError: levels don't decrease, or leave their stage's range.
    """
    if len(levels) != pyramid.depth:
        raise UsageError(f"expected levels for {pyramid.depth} stage(s), coarsest first; found {len(levels)} list(s)")
    return tuple(
        _stage_levels(pyramid, index, [float(level) for level in group], scaled_start and index + 1 == pyramid.depth)
        for index, group in zip(reversed(range(pyramid.depth)), levels, strict=True)
    )


def _stage_levels(pyramid: Pyramid, index: int, levels: list[float], free: bool) -> tuple[float, ...]:
    noisy, clean = pyramid.bounds(index)
    if pyramid.clock is not None:
        if not levels:
            raise UsageError(f"expected at least one level for stage {index}, which has a clock; found none")
    elif not levels or (levels[0] < noisy - SNAP and not free):
        levels = [noisy, *levels]
    elif abs(levels[0] - noisy) <= SNAP:
        levels = [noisy, *levels[1:]]
    outside = [level for level in levels if not clean < level <= noisy]
    if outside:
        raise UsageError(
            f"level {outside[0]:.6g} is outside the range of stage {index}: "
            f"expected above {clean:.6f} and at most {noisy:.6f}"
        )
    for a, b in pairwise(levels):
        if not a > b:
            raise UsageError(f"levels of stage {index} must decrease, found {b:.6g} after {a:.6g}")
    return tuple(levels)


def parse_steps(name: str) -> tuple[int, ...] | None:
    """Steps of a name such as "2-2-1", or None if the name is not of that form."""
    parts = name.split("-")
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < 5 for part in parts) else None


def parse_levels(text: str) -> list[list[float]]:
    """Levels as written on a command line: "1,0.9863/0.9412,0.8645/0.5858", coarsest stage first.

    Raises:
        UsageError: a part is not a number.
    """
    try:
        return [[float(level) for level in group.split(",") if level.strip()] for group in text.split("/")]
    except ValueError:
        raise UsageError(
            "levels are numbers separated by commas, stages by slashes, coarsest first, such as "
            f"1,0.9863/0.9412,0.8645/0.5858; found '{text}'"
        ) from None
