"""Solvers: from a latent and its velocity to the latent at the step's next level.

A solver is a line in `SOLVERS`: what makes it, the options that a schedule may give it, the levels of its scheduler in
diffusers, and what the network is told of a level.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..documents import Fields
from ..errors import UsageError
from .clock import clock_times
from .levels import up
from .noise import standard_normal
from .unipc import NEAR_NOISE, UniPC

if TYPE_CHECKING:
    from .plan import StepPlan

__all__ = ["EULER", "SOLVERS", "Dmd", "Solver", "SolverChoice", "euler", "flow_sigmas", "renoise", "train_sigmas"]

Latent = NDArray[np.float32]


class Solver(Protocol):
    """Takes the steps of one run, in order; it may remember what it has seen."""

    def __call__(self, step: "StepPlan", latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
        """The latent [C, T, H, W] after a step, float32; `noise` is the run's own generator."""
        ...


def euler(step: "StepPlan", latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
    """x + (σ' - σ)·v in each frame group, where σ is the group's global level at this scale."""
    out = np.empty_like(latent)
    for group, (sigma, after) in zip(step.stage.groups, step.sigmas, strict=True):
        out[:, group.frames] = latent[:, group.frames] + latent.dtype.type(after - sigma) * velocity[:, group.frames]
    return out


def renoise(step: "StepPlan", latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
    """x0 = x - σ·v, then (1 - σ')·x0 + σ'·ε with fresh noise, in one draw a step (LCM, DMD).

    As diffusers' FlowMatchLCMScheduler, whose last step draws too.
    """
    fresh = standard_normal(noise, latent.shape).astype(latent.dtype)
    out = np.empty_like(latent)
    for group, (sigma, after) in zip(step.stage.groups, step.sigmas, strict=True):
        frames, number = group.frames, latent.dtype.type
        clean = latent[:, frames] - number(sigma) * velocity[:, frames]
        out[:, frames] = number(1 - after) * clean + number(after) * fresh[:, frames]
    return out


class Dmd:
    """x0 = x - ρ·v, then (1 - ρ')·x0 + ρ'·(what the stage started from), as diffusers' `HeliosDMDScheduler`.

    The noise that is put back is the stage's own, and none is drawn; σ takes ρ's place where stages have no clocks.
    """

    def __init__(self) -> None:
        """The solver of one run."""
        self._start: Latent | None = None

    def __call__(self, step: "StepPlan", latent: Latent, velocity: Latent, noise: np.random.Generator) -> Latent:
        """The latent [C, T, H, W] after a step."""
        if step.position == 0 or self._start is None:
            self._start = latent
        out = np.empty_like(latent)
        for group, (rho, after) in zip(step.stage.groups, step.sigmas, strict=True):
            frames, number = group.frames, latent.dtype.type
            clean = latent[:, frames] - number(rho) * velocity[:, frames]
            out[:, frames] = number(1 - after) * clean + number(after) * self._start[:, frames]
        return out


def train_sigmas(n: int, shift: float) -> tuple[float, ...]:
    """Sigmas of diffusers' FlowMatch schedulers' `set_timesteps(n)`: from 1 to the shifted 1/1000, shifted (again)."""
    last = up(shift, 1e-3)
    return tuple(up(shift, 1 + (last - 1) * j / max(n - 1, 1)) for j in range(n))


def flow_sigmas(n: int, shift: float) -> tuple[float, ...]:
    """Sigmas of diffusers' `UniPCMultistepScheduler.set_timesteps(n)` with flow sigmas: from 1, 1/1000 left out."""
    step = (1e-3 - 1) / n
    return tuple(up(shift, j * step + 1) for j in range(n))


def _natural(level: float) -> float:
    return level


def _truncated(level: float) -> float:
    """Of 1000 whole timesteps, the one below: as diffusers' UniPC stores them."""
    return int(1000 * min(level, 1 - NEAR_NOISE)) / 1000


@dataclass(frozen=True)
class _Option:
    """An option of a solver: its default, and what else it may be."""

    default: Any
    expected: str
    valid: Callable[[Any], bool]


@dataclass(frozen=True)
class SolverFacts:
    """What is true of a solver."""

    make: Callable[..., Solver]
    """Of a run; its options are arguments."""
    sigmas: Callable[[int, float], tuple[float, ...]]
    """Levels of a number of steps and a shift, in diffusers' scheduler of it."""
    times: Callable[[int], tuple[float, ...]] = clock_times
    """ρ of a number of steps, in a stage that has a clock."""
    conditioned: Callable[[float], float] = _natural
    """The level that the network is told of, from the one that the step starts at."""
    options: Mapping[str, _Option] = field(default_factory=dict)
    draws: bool = False
    """Steps draw noise: a scheduler of diffusers would draw other noise than the run's generator."""


SOLVERS: Mapping[str, SolverFacts] = {
    "euler": SolverFacts(lambda: euler, train_sigmas),
    "unipc": SolverFacts(
        UniPC,
        flow_sigmas,
        conditioned=_truncated,
        options={
            "order": _Option(2, "1, 2 or 3", lambda v: type(v) is int and 1 <= v <= 3),
            "variant": _Option("bh2", "bh1 or bh2", lambda v: v in ("bh1", "bh2")),
            "lower_order_final": _Option(True, "true or false", lambda v: isinstance(v, bool)),
        },
    ),
    "renoise": SolverFacts(lambda: renoise, train_sigmas, draws=True),
    "dmd": SolverFacts(Dmd, train_sigmas, partial(clock_times, without_last=True)),
}
"""By name."""


@dataclass(frozen=True)
class SolverChoice:
    """A solver, and the options that are not its defaults."""

    name: str = "euler"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def facts(self) -> SolverFacts:
        """What is true of the solver."""
        return SOLVERS[self.name]

    def start(self) -> Solver:
        """The solver of a run."""
        return self.facts.make(**dict(self.options))

    @classmethod
    def of(cls, name: str, source: str = "--solver", **options: Any) -> "SolverChoice":
        """A solver by its name, with options.

        Raises:
            UsageError: there is no such solver or option, or an option is none of what it may be.
        """
        if name not in SOLVERS:
            raise UsageError(f"{source}: unknown solver {name!r:.60}: expected one of {', '.join(SOLVERS)}")
        fields, known = Fields(options, f"{source}: solver '{name}'"), SOLVERS[name].options
        fields.only(known)
        given = {key: fields.get(key, option.expected, option.valid, option.default) for key, option in known.items()}
        return cls(name, tuple((key, value) for key, value in given.items() if value != known[key].default))

    @classmethod
    def from_json(cls, document: Any, source: str) -> "SolverChoice":
        """From a name, or an object with a name and options.

        Raises:
            UsageError: it is neither, or there is no such solver or option.
        """
        if isinstance(document, str):
            return cls.of(document, source)
        fields = Fields(document, f"{source}: solver")
        options = {key: value for key, value in fields.document.items() if key != "name"}
        return cls.of(fields.text("name"), source, **options)

    def to_json(self) -> Any:
        """The document that `from_json` reads."""
        return {"name": self.name, **dict(self.options)} if self.options else self.name


EULER = SolverChoice()
