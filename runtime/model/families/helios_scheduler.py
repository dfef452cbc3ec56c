"""What the schedulers of Helios say: where stages end, their clocks, and how a folder is sampled.

Facts are those of diffusers' `HeliosScheduler`, `HeliosDMDScheduler` and `HeliosPyramidPipeline`.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ...chain.clock import SHIFTS, TOP, Clock, DynamicShift
from ...chain.levels import up
from ...chain.solvers import SolverChoice
from ...documents import Fields, is_number, read_json
from ...errors import UsageError
from ..scheduler import check_fixed, scheduler_class, unipc_of

__all__ = ["described", "published", "stage_clock"]

STEPS = 1000
STAGES = 3
GAIN = 2.0
"""ω of height and width, which stages halve."""

DISTILLED = "HeliosDMDScheduler"
OTHERS = "HeliosScheduler"

ZERO_STAR: dict[str, Any] = {"guidance": "zero-star", "zeroed_steps": 2}
"""How a schedule is guided where the index says so: the pipeline's `zero_steps` is 1, and i <= zero_steps."""

FIXED: Mapping[str, tuple[Any, Any]] = {
    "num_train_timesteps": (STEPS, STEPS),
    "shift": (1.0, 1.0),
    "stages": (STAGES, STAGES),
    "gamma": (1 / 3, 1 / 3),
    "prediction_type": ("flow_prediction", "flow_prediction"),
    "use_flow_sigmas": (True, True),
    "predict_x0": (True, True),
    "thresholding": (False, False),
    "lower_order_final": (True, True),
    "disable_corrector": ([], []),
    "solver_p": (None, None),
}
"""Fields that have one value that is supported, after the classes' default: γ = 1/3 is the Haar wavelet's noise."""


def described(folder: Path) -> dict[str, Any]:
    """What the `pyramid.json` of a folder of Helios would say.

    Raises:
        UsageError: its scheduler is none of Helios, or has options that are not supported.
    """
    index = Fields(read_json(folder / "model_index.json"), str(folder / "model_index.json"))
    file, name = folder / "scheduler" / "scheduler_config.json", scheduler_class(folder)
    if name not in (DISTILLED, OTHERS):
        raise UsageError(f"{file}: Helios is sampled with {OTHERS} or {DISTILLED}, found {name or 'none':.60}")
    fields = Fields(read_json(file), str(file))
    check_fixed(fields, name, FIXED)
    distilled = name == DISTILLED
    if _switch(index, "is_distilled") != distilled:
        raise index.wrong("is_distilled", f"{'true' if distilled else 'false'}, beside a {name}")
    schedule = _distilled() if distilled else _undistilled(fields)
    schedule |= ZERO_STAR if _switch(index, "is_cfg_zero_star") else {}
    return _document(fields, schedule, form="linear" if distilled else "exponential")


def published() -> dict[str, Any]:
    """What the `pyramid.json` of Helios-Distilled would say, with Helios-Mid's schedule beside its own."""
    fields = Fields({"use_dynamic_shifting": True}, DISTILLED)
    return _document(fields, _distilled(), _undistilled(Fields({}, OTHERS)) | ZERO_STAR, form="linear")


def _document(fields: Fields, *schedules: Mapping[str, Any], form: str) -> dict[str, Any]:
    """By a scheduler's configuration; its dynamic shift is of a form by default."""
    ends = _ends(fields)
    clock = stage_clock(ends, _dynamic_shift(fields, form))
    if any(first <= last for first, last in clock.timesteps):
        raise fields.wrong("stage_range", f"shares that leave each stage one of {STEPS} timesteps or more")
    return {
        "kind": "clocked",
        "stages": STAGES,
        "wavelet": "haar",
        "axes": "HW",
        "first_frame": "joint",
        "clean_levels": [up(GAIN**index, end) for index, end in enumerate(reversed(ends))],
        "clock": clock.to_json(),
        "schedules": {"-".join(map(str, schedule["steps"])): schedule for schedule in schedules},
    }


def _distilled() -> dict[str, Any]:
    return {"steps": [2] * STAGES, "shift": 1.0, "guidance_scale": 1.0, "solver": "dmd", "amplify_first_chunk": True}


def _undistilled(fields: Fields) -> dict[str, Any]:
    name = fields.text("scheduler_type", "unipc", choices=("unipc", "euler"))
    solver = unipc_of(fields, fields.source) if name == "unipc" else SolverChoice.of(name)
    return {"steps": [20] * STAGES, "shift": 1.0, "guidance_scale": 5.0, "solver": solver.to_json()}


def _switch(fields: Fields, name: str) -> bool:
    return bool(fields.get(name, "true or false", lambda value: isinstance(value, bool), False))


def _noise(index: int) -> float:
    """σ of an entry of diffusers' table, which starts short of 1."""
    return TOP * (STEPS - index) / STEPS


def _ends(fields: Fields) -> list[float]:
    """σ, at its own scale, at which each stage ends, coarsest first."""

    def is_range(value: Any) -> bool:
        numbers = isinstance(value, list) and len(value) == STAGES + 1 and all(map(is_number, value))
        return numbers and value[0] == 0 and value[-1] == 1 and all(a < b for a, b in pairwise(value))

    shares = fields.get(
        "stage_range", f"{STAGES + 1} numbers that increase from 0 to 1", is_range, [0, 1 / 3, 2 / 3, 1]
    )
    return [_noise(int(share * STEPS)) for share in shares[1:-1]] + [0.0]


def _dynamic_shift(fields: Fields, form: str) -> DynamicShift | None:
    if not _switch(fields, "use_dynamic_shifting"):
        return None
    tokens = fields.integer("base_image_seq_len", 256), fields.integer("max_image_seq_len", 4096)
    shifts = fields.number("base_shift", 0.5), fields.number("max_shift", 1.15)
    return DynamicShift(fields.text("time_shift_type", form, choices=SHIFTS), tokens, shifts)


def stage_clock(ends: Sequence[float], shift: DynamicShift | None) -> Clock:
    """The clock of stages that end at these σ, coarsest first: each has its share of the timesteps.

    A share is as long as the σ that a stage passes through, of all stages. Without a dynamic shift ρ = 0.999 is told
    as a stage's first timestep and 0 as its last; with one, 1 as its first and 0 as the last but one of 1000.
    """
    starts = [TOP, *(up(GAIN, end) for end in ends[:-1])]
    lengths = [start - end for start, end in zip(starts, ends, strict=True)]
    places = [0, *(min(int(passed / sum(lengths) * STEPS), STEPS - 1) for passed in accumulate(lengths))]
    ticks = []
    for first, last in pairwise(STEPS * _noise(place) for place in places):
        one = first if shift is not None else last + (first - last) / TOP
        ticks.append((one, last + (first - last) / STEPS if shift is not None else last))
    return Clock(tuple(reversed(ticks)), whole=True, shift=shift)
