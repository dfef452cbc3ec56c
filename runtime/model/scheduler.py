"""The scheduler of a diffusers folder: which solver its pipeline samples with, and with which shift."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chain.solvers import EULER, SolverChoice
from ..documents import Fields, read_json
from ..errors import UsageError

__all__ = ["SCHEDULERS", "read_scheduler"]

DEFAULT_SHIFT = 5.0
"""Where there is no scheduler."""


@dataclass(frozen=True)
class _Scheduler:
    """A class of diffusers that a solver stands for."""

    shift: str
    """The field that holds the shift."""
    default_shift: float
    solver: Callable[[Fields, str], SolverChoice]
    fixed: Mapping[str, tuple[Any, Any]]
    """Fields that have one value that is supported, after the class's default."""


_OFF = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), (False, False)
)
_COMMON = {**_OFF, "num_train_timesteps": (1000, 1000), "shift_terminal": (None, None)}


def _unipc(fields: Fields, source: str) -> SolverChoice:
    return SolverChoice.of(
        "unipc",
        source,
        order=fields.document.get("solver_order", 2),
        variant=fields.document.get("solver_type", "bh2"),
        lower_order_final=fields.document.get("lower_order_final", True),
    )


SCHEDULERS: Mapping[str, _Scheduler] = {
    "FlowMatchEulerDiscreteScheduler": _Scheduler(
        "shift",
        1.0,
        lambda fields, source: EULER,
        {**_COMMON, "invert_sigmas": (False, False), "stochastic_sampling": (False, False)},
    ),
    "UniPCMultistepScheduler": _Scheduler(
        "flow_shift",
        1.0,
        _unipc,
        {
            **_COMMON,
            "prediction_type": ("epsilon", "flow_prediction"),
            "use_flow_sigmas": (False, True),
            "predict_x0": (True, True),
            "thresholding": (False, False),
            "final_sigmas_type": ("zero", "zero"),
            "disable_corrector": ([], []),
            "solver_p": (None, None),
        },
    ),
    "FlowMatchLCMScheduler": _Scheduler(
        "shift",
        1.0,
        lambda fields, source: SolverChoice.of("renoise", source),
        {**_COMMON, "invert_sigmas": (False, False), "scale_factors": (None, None)},
    ),
}
"""By the name of the class."""


def read_scheduler(folder: Path) -> tuple[SolverChoice, float]:
    """The solver and the shift of a checkpoint's scheduler; Euler and 5 where there is none.

    Raises:
        UsageError: it is of a class, or has options, that no solver here stands for.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return EULER, DEFAULT_SHIFT
    fields = Fields(read_json(file), str(file))
    name = fields.text("_class_name")
    if name not in SCHEDULERS:
        raise UsageError(
            f"{file}: the scheduler {name:.60} has no solver here: expected one of {', '.join(SCHEDULERS)}; "
            "choose one with a schedule in pyramid.json"
        )
    scheduler = SCHEDULERS[name]
    for field, (default, supported) in scheduler.fixed.items():
        found = fields.document.get(field, default)
        if found != supported:
            raise UsageError(f"{file}: {name} with {field} {found!r:.60} has no solver here: expected {supported!r}")
    return scheduler.solver(fields, str(file)), fields.number(scheduler.shift, scheduler.default_shift)
