"""The stages of a model: the levels between which each denoises, what it takes, and what its integers hold."""

from collections.abc import Callable, Iterator, Sequence
from xml.etree.ElementTree import Element

from ...runtime.chain.plan import StepPlan
from ...runtime.chain.pyramid import FrameGroup, Stage
from .charts import Interval, intervals
from .page import section, table, tag
from .subject import Subject

__all__ = ["boundaries", "stages_section"]

COLUMNS = ("stage", "latent", "tokens", "natural level", "sigma", "steps")


def stages_section(subject: Subject, measured: str, figure: Callable[[int], str]) -> Element:
    """A row for each stage in the order of sampling, with a column of the caller's.

    Args:
        subject: what was compared; steps are those of its first run.
        measured: name of the last column.
        figure: what stands in it for a stage, by its index.
    """
    steps = subject.steps(0)
    stages = reversed(subject.manifest.stages)
    rows = [[*_facts(stage, steps), figure(stage.index)] for stage in stages]
    return section("Stages", table([*COLUMNS, measured], rows), *_held(subject))


def _facts(stage: Stage, steps: Sequence[StepPlan]) -> Iterator[str]:
    yield str(stage.index)
    yield "×".join(map(str, stage.latent))
    yield f"{stage.tokens:,}"
    yield f"{stage.noisy:.4f} → {stage.clean:.4f}"
    yield "\n".join(_sigmas(group, stage) for group in stage.groups)
    yield str(sum(step.stage.index == stage.index for step in steps))


def _sigmas(group: FrameGroup, stage: Stage) -> str:
    """Global levels between which a group of frames is denoised."""
    ends = (group.global_level(stage.index, level) for level in (stage.noisy, stage.clean))
    return f"{group.name} {' → '.join(f'{sigma:.4f}' for sigma in ends)}"


def _held(subject: Subject) -> Iterator[Element]:
    """What the integers of layers' inputs hold in each stage, where layers are rounded by constants."""
    ranges = subject.manifest.ranges
    if not ranges:
        return
    for stage in reversed(subject.manifest.stages):
        found = [Interval(layer, *ends[stage.index]) for layer, ends in ranges.items()]
        yield intervals(found, f"what the integers of {len(found)} inputs hold in stage {stage.index}, layer by layer")
    words = "Each bar is a layer's input; the axis is log(1 + |x|) to both sides of 0."
    yield tag("p", words, class_="note")


def boundaries(subject: Subject) -> list[tuple[float, str]]:
    """Where stages begin on an axis that counts steps from 1, and which; none where runs differ in that."""
    if len({run.schedule.steps for run in subject.runs}) > 1:
        return []
    begun = (step for step in subject.steps(0) if step.position == 0)
    return [(step.index + 0.5 if step.index else 1, f"stage {step.stage.index}") for step in begun]
