"""How a diffusers folder is sampled: the solver and the shift of its scheduler, and where two networks change."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chain.solvers import EULER, SolverChoice
from ..documents import Fields, read_json
from ..errors import UsageError

__all__ = ["SCHEDULERS", "check_fixed", "read_boundary", "read_scheduler", "scheduler_class", "unipc_of"]

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


_VARIANTS = {name: name if name == "bh1" else "bh2" for name in ("bh1", "bh2", "midpoint", "heun", "logrho")}
"""By diffusers' `solver_type`, which takes the last three for bh2."""


def unipc_of(fields: Fields, source: str) -> SolverChoice:
    """UniPC with the options of a scheduler's configuration.

    Raises:
        UsageError: one is none that UniPC has.
    """
    return SolverChoice.of(
        "unipc",
        source,
        order=fields.get("solver_order", "1, 2 or 3", lambda v: type(v) is int and 1 <= v <= 3, 2),
        variant=_VARIANTS[fields.text("solver_type", "bh2", choices=_VARIANTS)],
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
        unipc_of,
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


def scheduler_class(folder: Path) -> str | None:
    """Name of the class of a checkpoint's scheduler, which `model_index.json` decides; None where there is none.

    Raises:
        UsageError: there should be one, and its configuration is not there.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    named = Fields(read_json(folder / "model_index.json"), str(folder / "model_index.json")).document.get("scheduler")
    name = named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None
    if not file.is_file():
        if name is not None:
            raise UsageError(
                f"{file} is missing: model_index.json names the scheduler {name:.60}; "
                "fetch it, or choose a solver with a schedule in pyramid.json"
            )
        return None
    return name or Fields(read_json(file), str(file)).text("_class_name")


def read_scheduler(folder: Path) -> tuple[SolverChoice, float]:
    """The solver and the shift of a checkpoint's scheduler; Euler and 5 where there is none.

    Raises:
        UsageError: it is of a class, or has options, that no solver here stands for.
    """
    file, name = folder / "scheduler" / "scheduler_config.json", scheduler_class(folder)
    if name is None:
        return EULER, DEFAULT_SHIFT
    fields = Fields(read_json(file), str(file))
    if name not in SCHEDULERS:
        raise UsageError(
            f"{file}: the scheduler {name:.60} has no solver here: expected one of {', '.join(SCHEDULERS)}; "
            "choose one with a schedule in pyramid.json"
        )
    scheduler = SCHEDULERS[name]
    check_fixed(fields, name, scheduler.fixed)
    return scheduler.solver(fields, str(file)), fields.number(scheduler.shift, scheduler.default_shift)


def check_fixed(fields: Fields, name: str, fixed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse fields of a scheduler that are not the one value that is supported.

    Args:
        fields: its configuration.
        name: of its class.
        fixed: by field the class's default, and that value.

    Raises:
        UsageError: there is such a field.
    """
    for field, (default, supported) in fixed.items():
        found = fields.document.get(field, default)
        if found != supported:
            raise UsageError(
                f"{fields.source}: {name} with {field} {found!r:.60} has no solver here: expected {supported!r}"
            )


def read_boundary(folder: Path) -> float | None:
    """Where the second of a checkpoint's two networks takes over, as `model_index.json` says it; None: it has one.

    Raises:
        UsageError: it is no number.
    """
    index = Fields(read_json(folder / "model_index.json"), str(folder / "model_index.json"))
    return None if index.document.get("boundary_ratio") is None else index.number("boundary_ratio")
