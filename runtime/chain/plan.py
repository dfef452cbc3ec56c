"""A run as a flat list of steps: everything that is known of it before its first evaluation."""

from dataclasses import dataclass

from .pyramid import Pyramid, Resolution, Stage
from .schedules import Schedule
from .solvers import EULER, SolverChoice

__all__ = ["StepPlan", "plan", "single_step"]


@dataclass(frozen=True)
class StepPlan:
    """One step of a run."""

    index: int
    """Number of the step in the run, from 0."""
    stage: Stage
    position: int
    """Number of the step within its stage, from 0."""
    timestep: float
    """What the network is conditioned on."""
    level: float
    """Natural level that the step starts from."""
    next_level: float
    sigmas: tuple[tuple[float, float], ...]
    """Global level of each of the stage's frame groups, before and after the step."""
    guidance_scale: float
    steps_of_stage: int
    """How many the stage has in this run."""
    solver: SolverChoice
    changes_stage: bool
    """The latent goes on to the next finer stage after it."""
    scaled_start: bool = False
    """The run begins with it, from σ·ε in place of pure noise."""
    expert: int = 0
    """Index of the network that evaluates it, of a model that has several."""

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is evaluated too (as diffusers: scale above 1)."""
        return self.guidance_scale > 1


def plan(pyramid: Pyramid, resolution: Resolution, schedule: Schedule) -> tuple[StepPlan, ...]:
    """The steps of a schedule, from the noisiest on.

    Raises:
        UsageError: the resolution does not fit the pyramid.
    """
    steps: list[StepPlan] = []
    for stage, levels in zip(reversed(pyramid.stages(resolution)), schedule.levels, strict=True):
        for position, (level, after) in enumerate(zip(levels, (*levels[1:], stage.clean), strict=True)):
            last = position + 1 == len(levels)
            timestep = pyramid.kind.timestep(schedule.solver.facts.conditioned(level))
            expert = pyramid.expert(timestep)
            steps.append(
                StepPlan(
                    index=len(steps),
                    stage=stage,
                    position=position,
                    timestep=timestep,
                    level=level,
                    next_level=after,
                    sigmas=_sigmas(stage, level, after),
                    guidance_scale=schedule.guidance_of(expert),
                    steps_of_stage=len(levels),
                    solver=schedule.solver,
                    changes_stage=last and stage.index > 0,
                    scaled_start=schedule.scaled_start and not steps,
                    expert=expert,
                )
            )
    return tuple(steps)


def single_step(pyramid: Pyramid, stage: Stage, level: float) -> StepPlan:
    """One evaluation of a stage at a natural level, outside of any schedule and without guidance."""
    sigmas = _sigmas(stage, level, level)
    timestep = pyramid.kind.timestep(level)
    return StepPlan(
        0,
        stage,
        0,
        timestep,
        level,
        level,
        sigmas,
        1.0,
        steps_of_stage=1,
        solver=EULER,
        changes_stage=False,
        expert=pyramid.expert(timestep),
    )


def _sigmas(stage: Stage, level: float, after: float) -> tuple[tuple[float, float], ...]:
    return tuple(
        (group.global_level(stage.index, level), group.global_level(stage.index, after)) for group in stage.groups
    )
