"""What rounding costs: each layer alone in each stage, and the fewest to keep for videos to stay as they were."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.reference.reference import Reference
from ..runtime.chain.plan import StepPlan
from ..runtime.chain.sampler import Conditions, Denoiser, Step, sample, told_of
from ..runtime.choices import Choice
from ..runtime.errors import CheckFailed
from ..runtime.pipeline.chunks import split
from ..runtime.proof.metrics import distance, psnr
from ..runtime.quantisation import Scheme
from ..runtime.recipe import Trial
from ..runtime.reporter import Reporter
from .rounding import RoundedReference

__all__ = ["JUDGED", "Judge", "keep_worst"]

JUDGED = 4
"""Most prompts whose videos are compared in each trial."""

Choices = Mapping[str, Choice]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Run:
    """A run of the reference."""

    conditions: Conditions
    seed: int
    frames: NDArray[np.uint8]
    given: Mapping[int, Floats]
    """The latent before each step, by the step's number."""
    past: Floats | None
    """Latents of the chunks before the last [C, T, H, W], where there are some."""


@dataclass
class Judge:
    """Compares what the reference gives with what it gives while layers are rounded."""

    reference: Reference
    steps: Sequence[StepPlan]
    negative: Conditions
    schemes: Mapping[str, Scheme]
    reporter: Reporter
    """Told of each evaluation."""
    runs: list[_Run] = field(default_factory=list)

    def add(self, text: Floats, seed: int) -> None:
        """Sample the embeddings [text length, text width] of a prompt to compare with."""
        self.reporter.begin("videos to compare with", len(self.steps))
        given: dict[int, Floats] = {}
        conditions: Conditions = {"text": text}

        def keep(step: Step) -> None:
            given[step.plan.index] = step.before

        latent = self._sample(self.reference, conditions, seed, keep)
        checkpoint = self.reference.checkpoint
        *before, _ = split(latent, checkpoint.model, checkpoint.resolution)
        past = np.concatenate(before, axis=1) if before else None
        self.runs.append(_Run(conditions, seed, self.reference.decode(latent), given, past))

    def psnr(self, choices: Choices) -> float:
        """Median PSNR in dB of the videos of the runs."""
        kept = sum(not choice.scheme for choice in choices.values())
        self.reporter.begin(f"videos with {kept} of {len(choices)} layers kept", len(self.steps) * len(self.runs))
        rounded, found = RoundedReference(self.reference), []
        with rounded.rounded(choices, self.schemes):
            for run in self.runs:
                latent = self._sample(rounded, run.conditions, run.seed, lambda step: None)
                found.append(psnr(self.reference.decode(latent), run.frames))
        return float(median(found))

    def damage(self, choices: Choices) -> dict[str, tuple[float, ...]]:
        """Of each layer, rounded alone: relative L2 of the velocity in the middle of each stage, finest first.

        Of a video in chunks, in the last one, which is told of those before it.
        """
        run, rounded = self.runs[0], RoundedReference(self.reference)
        middles = [_middle(self.steps, stage) for stage in sorted({step.stage.index for step in self.steps})]
        self.reporter.begin("damage of each layer alone", len(choices) * len(middles))
        history = self.reference.checkpoint.model.family.history
        told = told_of(run.conditions, history, run.past, middles[0])
        exact = [self.reference.velocity(step, run.given[step.index], told) for step in middles]
        found: dict[str, tuple[float, ...]] = {}
        for layer, choice in choices.items():
            errors = []
            with rounded.rounded({layer: choice}, self.schemes):
                for step, velocity in zip(middles, exact, strict=True):
                    changed = rounded.velocity(step, run.given[step.index], told)
                    errors.append(distance(changed, velocity).relative_l2)
                    self.reporter.advance(1)
            found[layer] = tuple(errors)
        return found

    def _sample(self, denoiser: Denoiser, conditions: Conditions, seed: int, keep: Callable[[Step], None]) -> Floats:
        def done(step: Step) -> None:
            keep(step)
            self.reporter.advance(1)

        model = self.reference.checkpoint.model
        how: dict[str, Any] = {"negative": self.negative, "seed": seed, "callback": done}
        return sample(self.steps, model.pyramid.taps, denoiser, conditions, **how, history=model.family.history)


def _middle(steps: Sequence[StepPlan], stage: int) -> StepPlan:
    """The step in the middle of those of a stage that are evaluated, in the last chunk."""
    own = [s for s in steps if s.stage.index == stage and s.evaluations and s.chunk == steps[-1].chunk]
    return own[len(own) // 2]


def keep_worst(judge: Judge, choices: Choices, target: float) -> tuple[dict[str, Choice], tuple[Trial, ...]]:
    """Keep the fewest of the layers that damage most, so that the runs' videos reach a PSNR in dB.

    Args:
        judge: with its runs.
        choices: with the damage of each layer.
        target: median PSNR in dB.

    Returns:
        The choices, and what was tried.

    Raises:
        CheckFailed: layers that are all kept do not reach it.
    """
    order = sorted(choices, key=lambda layer: -max(choices[layer].damage))
    tried: dict[int, float] = {}

    def reaches(count: int) -> bool:
        if count not in tried:
            tried[count] = judge.psnr(with_kept(choices, order[:count], ""))
        return tried[count] >= target

    low, high = -1, 0
    while not reaches(high):
        if high == len(order):
            raise CheckFailed(
                f"no choice of layers to keep reaches {target:g} dB: ask for less than {tried[high]:.1f} dB"
            )
        low, high = high, min(max(2 * high, 1), len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    found = with_kept(choices, order[:high], f"one of the {high} that damage most")
    return found, tuple(Trial(count, value) for count, value in tried.items())


def with_kept(choices: Choices, layers: Sequence[str], reason: str) -> dict[str, Choice]:
    """Choices, but for some layers that are kept: of their numbers only what their input is divided by stays."""
    changed = {}
    for layer in layers:
        own = choices[layer]
        numbers = {name: array for name, array in own.tensors.items() if name == "migration"}
        changed[layer] = replace(own, scheme="", reason=reason, tensors=numbers)
    return {**choices, **changed}
