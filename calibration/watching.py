"""A prompt's run of the reference, whose layers are watched: here, or in another process.

Each prompt has statistics of its own, and these are merged in the order of the prompts: sums of float64 depend on the
order in which they are made, and so a recipe is the same wherever its prompts were run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..export.bundle.tiling import choose_tiles
from ..export.reference.reference import Reference
from ..runtime.bundle.tiles import Tiles
from ..runtime.chain.plan import StepPlan, plan
from ..runtime.chain.sampler import Conditions, sample
from ..runtime.chain.schedules import Schedule
from ..runtime.errors import UsageError
from ..runtime.pipeline.chunks import split
from ..runtime.reporter import Reporter
from ..runtime.trajectories import Trajectories
from .observe import Observer, frame_groups, observed, observed_decoder
from .request import CalibrationRequest
from .statistics import Seen, Sizes

__all__ = ["Elsewhere", "Prompt", "Watcher"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """A prompt that is to be run."""

    index: int
    """Of the prompts of the request."""
    text: Floats
    """Its embeddings [text length, text width]."""
    negative: Floats
    """Those of the negative prompt [text length, text width]."""


Elsewhere = Callable[[Trajectories, Sequence[Prompt]], Iterator[Seen]]
"""Runs prompts in other processes, each with a `Watcher`; gives what was seen in their order."""


class Watcher:
    """The reference of a checkpoint, ready to run prompts."""

    def __init__(
        self, reference: Reference, request: CalibrationRequest, run: Trajectories, reporter: Reporter
    ) -> None:
        """The reporter is told of each step, and of decoding as of another one.

        Raises:
            UsageError: a stage is sampled without its network, of which nothing would be seen.
        """
        checkpoint, model = reference.checkpoint, reference.checkpoint.model
        schedule = replace(request.schedule, first_chunk=())  # one number of steps for all chunks
        self.reference, self.request, self.reporter = reference, request, reporter
        self.steps = plan(model.pyramid, checkpoint.resolution, schedule, model.telling_chunks)
        _check_evaluated(self.steps, schedule)
        _, self.bounds = frame_groups(model.stages(checkpoint.resolution))
        self.sizes = Sizes(run.stages, len(run.passes), sum(run.schedule.steps))
        self.decodes = "vae" in request.methods

    @property
    def units(self) -> int:
        """How much of a prompt the reporter is told."""
        return len(self.steps) + self.decodes

    def watch(self, prompt: Prompt) -> Seen:
        """What the layers were given in the run of a prompt.

        Raises:
            CheckFailed: an input is not finite.
        """
        observer = Observer(self.sizes, self.bounds)
        with _watching(self.reference, observer, self.request.methods):
            latent = self._sample(observer, prompt)
            if self.decodes:
                _decode(self.reference, latent)
                self.reporter.advance(1)
        return observer.seen

    def _sample(self, observer: Observer, prompt: Prompt) -> Floats:
        conditions, negative = {"text": prompt.text}, {"text": prompt.negative}
        model = self.reference.checkpoint.model
        return sample(
            self.steps,
            model.pyramid.taps,
            _Watched(self.reference, observer, negative),
            conditions,
            negative=negative,
            seed=self.request.seed + prompt.index,
            callback=lambda _: self.reporter.advance(1),
            history=model.family.history,
        )


@dataclass(frozen=True)
class _Watched:
    """The reference as a denoiser that says which evaluation comes."""

    reference: Reference
    observer: Observer
    negative: Conditions

    def velocity(self, step: StepPlan, latent: Floats, conditions: Conditions) -> Floats:
        self.observer.at(step, unconditional=conditions["text"] is self.negative["text"])
        return self.reference.velocity(step, latent, conditions)


def _check_evaluated(steps: Sequence[StepPlan], schedule: Schedule) -> None:
    """Refuse a schedule by which a stage is sampled whose network is never evaluated: nothing would be seen of it."""
    unseen = {step.stage.index for step in steps} - {step.stage.index for step in steps if step.evaluations}
    if unseen:
        zeroed = schedule.guidance.zeroed_steps
        raise UsageError(
            f"schedule '{schedule.name}' evaluates nothing in stage {max(unseen)}, whose first {zeroed} steps have a "
            f"velocity of zero: expected at least {zeroed + 1} steps there; give others, or no guidance"
        )


@contextmanager
def _watching(reference: Reference, observer: Observer, components: Iterable[str]) -> Iterator[None]:
    watchers = {"transformer": observed, "vae": observed_decoder}
    with ExitStack() as undone:
        for component in components:
            undone.enter_context(watchers[component](reference, observer))
        yield


def _decode(reference: Reference, latent: Floats) -> None:
    """Decode as a bundle does: chunks alone, and large frames in tiles, which bounds memory; so its layers see it."""
    checkpoint, frame = reference.checkpoint, (latent.shape[2], latent.shape[3])
    (tile,) = choose_tiles(checkpoint, [frame])
    for chunk in split(latent, checkpoint.model, checkpoint.resolution):
        for rows, columns, _ in Tiles(frame, tile or frame).places():
            reference.decode_float(chunk[:, :, rows, columns], "vae")
