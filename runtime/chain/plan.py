"""A run as a flat list of steps: everything that is known of it before its first evaluation."""

from dataclasses import dataclass
from itertools import pairwise

from .guidance import PLAIN_GUIDANCE, Guidance
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
    """Of each of the stage's frame groups what the velocity is the derivative by, before and after the step: its global
    level, or ρ where stages have clocks."""
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
    chunk: int = 0
    """Number of the chunk that it is a step of."""
    guidance: Guidance = PLAIN_GUIDANCE
    zeroed: bool = False
    """Its velocity is zero, and nothing is evaluated."""

    @property
    def ends_chunk(self) -> bool:
        """The latent after it is a chunk's, or the whole video's."""
        return self.stage.index == 0 and self.position + 1 == self.steps_of_stage

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is evaluated too (as diffusers: scale above 1)."""
        return self.guidance_scale > 1

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for it."""
        return 0 if self.zeroed else 2 if self.guided else 1


def plan(pyramid: Pyramid, resolution: Resolution, schedule: Schedule, chunks: int = 1) -> tuple[StepPlan, ...]:
    """The steps of a schedule, from the noisiest on, for each chunk in turn.

    Raises:
        UsageError: the resolution does not fit the pyramid.
    """
    steps: list[StepPlan] = []
    for chunk in range(chunks):
        stages = pyramid.stages(resolution)[::-1]
        for before, stage, levels in zip((stages[0], *stages[:-1]), stages, schedule.levels_of(chunk), strict=True):
            ends = (*(pyramid.shifted(stage.index, level, before.tokens) for level in levels), stage.clean)
            for position, (level, after) in enumerate(pairwise(ends)):
                last = position + 1 == len(levels)
                told = level if pyramid.kind.clocked else schedule.solver.facts.conditioned(level)
                timestep = pyramid.timestep(stage.index, told)
                expert = pyramid.expert(timestep)
                zeroed = stage.index + 1 == pyramid.depth and position < schedule.guidance.zeroed_steps
                steps.append(
                    StepPlan(
                        index=len(steps),
                        stage=stage,
                        position=position,
                        timestep=timestep,
                        level=level,
                        next_level=after,
                        sigmas=pyramid.sigmas(stage, level, after),
                        guidance_scale=schedule.guidance_of(expert),
                        steps_of_stage=len(levels),
                        solver=schedule.solver,
                        changes_stage=last and stage.index > 0,
                        scaled_start=schedule.scaled_start and not steps,
                        expert=expert,
                        chunk=chunk,
                        guidance=schedule.guidance,
                        zeroed=schedule.guided and zeroed,
                    )
                )
    return tuple(steps)


def single_step(pyramid: Pyramid, stage: Stage, level: float) -> StepPlan:
    """One evaluation of a stage at a natural level, outside of any schedule and without guidance."""
    timestep = pyramid.timestep(stage.index, level)
    return StepPlan(
        0,
        stage,
        0,
        timestep,
        level,
        level,
        pyramid.sigmas(stage, level, level),
        1.0,
        steps_of_stage=1,
        solver=EULER,
        changes_stage=False,
        expert=pyramid.expert(timestep),
    )
