"""Schedules as `pyramid.json` writes them: steps and shift, or levels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chain.guidance import CLASSIFIER_FREE, GUIDANCES, PLAIN_GUIDANCE, Guidance
from ..chain.pyramid import Pyramid
from ..chain.schedules import MAX_GUIDANCE, Schedule, explicit_levels, spaced_levels
from ..chain.solvers import EULER, SolverChoice, train_sigmas
from ..documents import Fields, is_number
from ..errors import UsageError

__all__ = [
    "PAPER_SCHEDULES",
    "ScheduleEntry",
    "guidance_json",
    "parse_schedules",
    "plain_schedules",
    "read_guidance",
    "read_guidance_kind",
    "schedule_json",
]

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


WAN_A14B: dict[str, Any] = {"steps": [40], "guidance_scale": 4.0, "guidance_scale_2": 3.0}
"""How Wan2.2-T2V-A14B's own script samples."""


FIELDS = (
    "steps",
    "levels",
    "shift",
    "guidance_scale",
    "guidance_scale_2",
    "guidance",
    "zeroed_steps",
    "amplify_first_chunk",
    "solver",
    "start",
)


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
    guidance_scale_2: float | None = None
    """See `Schedule.guidance_scale_2`."""
    guidance: Guidance = PLAIN_GUIDANCE
    amplified: bool = False
    """The first chunk, of a model that makes videos in chunks, has twice the steps."""

    @classmethod
    def from_json(cls, document: Any, source: str) -> "ScheduleEntry":
        """Read an entry of `schedules`.

        Raises:
            UsageError: a field is missing, unknown or impossible.
        """
        entry = Fields(document, source)
        entry.only(FIELDS)
        guidance, shift = read_guidance(entry), entry.number("shift", 5.0)
        if {"levels", "steps"} <= entry.document.keys():
            raise UsageError(f"{entry.source}: expected steps or levels, found both")
        solver = SolverChoice.from_json(entry.document.get("solver", "euler"), source)
        scaled = entry.text("start", "noise", choices=("noise", "scaled")) == "scaled"
        if scaled and "levels" not in entry.document:
            raise entry.wrong("start", "noise: a scaled start needs levels, the first of which it starts at")
        how = read_guidance_kind(entry)
        amplified = entry.get("amplify_first_chunk", "true or false", lambda v: isinstance(v, bool), False)
        if "levels" in entry.document:
            if amplified:
                raise entry.wrong("amplify_first_chunk", "false: it is steps that are doubled, not levels")
            levels = entry.get("levels", "a list of natural levels per stage, coarsest first", _are_levels)
            return cls(
                (),
                tuple(tuple(map(float, group)) for group in levels),
                shift,
                guidance[0],
                solver,
                scaled,
                guidance[1],
                how,
            )
        steps = entry.get("steps", "steps per stage, coarsest first, from 1 to 9999 each", _are_steps)
        return cls(tuple(steps), (), shift, guidance[0], solver, False, guidance[1], how, amplified)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        levels = {"levels": [list(group) for group in self.levels]}
        how = levels if self.levels else {"steps": list(self.steps)}
        # The default schedule's shift spaces steps that have no schedule, whether it has levels itself or not.
        start = {"start": "scaled"} if self.scaled_start else {}
        common = {"shift": self.shift, "guidance_scale": self.guidance_scale, "solver": self.solver.to_json()}
        second = {} if self.guidance_scale_2 is None else {"guidance_scale_2": self.guidance_scale_2}
        first = {"amplify_first_chunk": True} if self.amplified else {}
        return {**how, **common, **second, **guidance_json(self.guidance), **first, **start}

    def schedule(self, name: str, pyramid: Pyramid) -> Schedule:
        """The levels for a pyramid.

        Raises:
            UsageError: they do not fit its stages.
        """
        first: tuple[tuple[float, ...], ...] = ()
        try:
            if self.levels:
                levels = explicit_levels(pyramid, self.levels, scaled_start=self.scaled_start)
            else:
                levels = spaced_levels(pyramid, self.steps, self.shift, self.solver)
                if self.amplified:
                    first = spaced_levels(pyramid, [2 * n for n in self.steps], self.shift, self.solver)
        except UsageError as error:
            raise UsageError(f"schedule '{name}': {error}") from None
        return Schedule(
            name,
            levels,
            self.guidance_scale,
            self.solver,
            self.scaled_start,
            self.guidance_scale_2,
            self.guidance,
            first,
        )


def read_guidance(entry: Fields) -> tuple[float, float | None]:
    """The fields `guidance_scale`, 1 where it is missing, and `guidance_scale_2`.

    Raises:
        UsageError: one is no scale of guidance.
    """
    second = None if entry.document.get("guidance_scale_2") is None else entry.number("guidance_scale_2")
    found = entry.number("guidance_scale", 1.0), second
    for name, scale in zip(("guidance_scale", "guidance_scale_2"), found, strict=True):
        if scale is not None and not 0 <= scale <= MAX_GUIDANCE:
            raise entry.wrong(name, f"a number from 0 to {MAX_GUIDANCE:g}")
    return found


def read_guidance_kind(entry: Fields) -> Guidance:
    """The fields `guidance` and `zeroed_steps`, classifier-free guidance and none where they are missing.

    Raises:
        UsageError: there is no such guidance.
    """
    zeroed = entry.get("zeroed_steps", "a whole number from 0", lambda v: type(v) is int and 0 <= v < 10_000, 0)
    return Guidance(entry.text("guidance", CLASSIFIER_FREE, choices=GUIDANCES), zeroed)


def guidance_json(guidance: Guidance) -> dict[str, Any]:
    """The fields that `read_guidance_kind` reads, those that are not their defaults."""
    named = {} if guidance.name == CLASSIFIER_FREE else {"guidance": guidance.name}
    return named | ({"zeroed_steps": guidance.zeroed_steps} if guidance.zeroed_steps else {})


def schedule_json(schedule: Schedule) -> dict[str, Any]:
    """All that tells a schedule that is run from others, but for its name."""
    first = {"first_chunk": [list(group) for group in schedule.first_chunk]}
    return {
        "levels": [list(group) for group in schedule.levels],
        "scaled_start": schedule.scaled_start,
        "guidance_scale": schedule.guidance_scale,
        "guidance_scale_2": schedule.guidance_scale_2,
        "solver": schedule.solver.to_json(),
        **guidance_json(schedule.guidance),
        **(first if schedule.first_chunk else {}),
    }


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


def plain_schedules(shift: float, solver: SolverChoice, *, experts: int = 1) -> Mapping[str, Any]:
    """The schedules of a plain Wan model: its authors', with its scheduler's shift and solver, and the paper's.

    Authors guide a model of two networks less, and in fewer steps.
    """
    own: dict[str, Any] = {"steps": [50], "guidance_scale": 5.0} if experts == 1 else WAN_A14B
    return {str(own["steps"][0]): {**own, "shift": shift, "solver": solver.to_json()}, **PLAIN_SCHEDULES}
