"""Schedules as `pyramid.json` writes them: steps and shift, or levels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chain.pyramid import Pyramid
from ..chain.schedules import MAX_GUIDANCE, Schedule, explicit_levels, spaced_levels
from ..chain.solvers import EULER, SolverChoice, train_sigmas
from ..documents import Fields, is_number
from ..errors import UsageError

__all__ = ["PAPER_SCHEDULES", "ScheduleEntry", "parse_schedules", "plain_schedules"]

PAPER_SCHEDULES = {
    "2-2-1": {"steps": [2, 2, 1], "guidance_scale": 1.0},
    "2-2-2": {"steps": [2, 2, 2], "guidance_scale": 1.0},
    "1-1-1": {"steps": [1, 1, 1], "guidance_scale": 1.0},
    "20-20-10": {"steps": [20, 20, 10], "guidance_scale": 5.0},
}
"""Schedules of PyramidalWan (supplement A3 and the cost table)."""

PLAIN_SCHEDULES = {
    "distilled-4": {"steps": [4], "guidance_scale": 1.0},
    "distilled-2": {"levels": [list(train_sigmas(3, 5.0)[:2])], "guidance_scale": 1.0},
}
"""Schedules of distilled plain Wan (supplement A3): `set_timesteps(4)`, and the first two of `set_timesteps(3)`.

A number alone is so many steps of the folder's own scheduler."""


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule as it is written; resolved for a pyramid by `schedule`."""

    steps: tuple[int, ...] = ()
    levels: tuple[tuple[float, ...], ...] = ()
    shift: float = 5.0
    guidance_scale: float = 1.0
    solver: SolverChoice = EULER
    scaled_start: bool = False
    """The run starts from σ_0·ε at the first of its levels, in place of pure noise."""

    @classmethod
    def from_json(cls, document: Any, source: str) -> "ScheduleEntry":
        """Read an entry of `schedules`.

        Raises:
            UsageError: a field is missing, unknown or impossible.
        """
        entry = Fields(document, source)
        entry.only(("steps", "levels", "shift", "guidance_scale", "solver", "start"))
        guidance, shift = entry.number("guidance_scale", 1.0), entry.number("shift", 5.0)
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise entry.wrong("guidance_scale", f"a number from 0 to {MAX_GUIDANCE:g}")
        if {"levels", "steps"} <= entry.document.keys():
            raise UsageError(f"{entry.source}: expected steps or levels, found both")
        solver = SolverChoice.from_json(entry.document.get("solver", "euler"), source)
        scaled = entry.text("start", "noise", choices=("noise", "scaled")) == "scaled"
        if scaled and "levels" not in entry.document:
            raise entry.wrong("start", "noise: a scaled start needs levels, the first of which it starts at")
        if "levels" in entry.document:
            levels = entry.get("levels", "a list of natural levels per stage, coarsest first", _are_levels)
            return cls((), tuple(tuple(map(float, group)) for group in levels), shift, guidance, solver, scaled)
        steps = entry.get("steps", "steps per stage, coarsest first, from 1 to 9999 each", _are_steps)
        return cls(tuple(steps), (), shift, guidance, solver)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        levels = {"levels": [list(group) for group in self.levels]}
        how = levels if self.levels else {"steps": list(self.steps)}
        # The default schedule's shift spaces steps that have no schedule, whether it has levels itself or not.
        start = {"start": "scaled"} if self.scaled_start else {}
        common = {"shift": self.shift, "guidance_scale": self.guidance_scale, "solver": self.solver.to_json()}
        return {**how, **common, **start}

    def schedule(self, name: str, pyramid: Pyramid) -> Schedule:
        """The levels for a pyramid.

        Raises:
            UsageError: they do not fit its stages.
        """
        try:
            if self.levels:
                levels = explicit_levels(pyramid, self.levels, scaled_start=self.scaled_start)
            else:
                levels = spaced_levels(pyramid, self.steps, self.shift, self.solver)
        except UsageError as error:
            raise UsageError(f"schedule '{name}': {error}") from None
        return Schedule(name, levels, self.guidance_scale, self.solver, self.scaled_start)


def parse_schedules(fields: Fields) -> dict[str, ScheduleEntry]:
    """The field `schedules` of a document: at least one."""
    schedules = {
        name: ScheduleEntry.from_json(value, f"{fields.source}: schedule '{name}'")
        for name, value in fields.object("schedules").document.items()
    }
    if not schedules:
        raise fields.wrong("schedules", "at least one schedule")
    return schedules


def _are_levels(value: Any) -> bool:
    lists = isinstance(value, list) and bool(value)
    return lists and all(isinstance(group, list) and all(map(is_number, group)) for group in value)


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 < n < 10_000 for n in value)


def plain_schedules(shift: float, solver: SolverChoice) -> Mapping[str, Any]:
    """The schedules of a plain Wan model: its pipeline's, with its scheduler's shift and solver, and the paper's."""
    own = {"steps": [50], "shift": shift, "guidance_scale": 5.0, "solver": solver.to_json()}
    return {"50": own, **PLAIN_SCHEDULES}
