"""What `sample` does with a job, here or on a cluster's worker."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.chain.sampler import Step
from ..runtime.chain.schedules import Schedule
from ..runtime.model.schedules import schedule_json
from ..runtime.pipeline.latents import Origin
from .common import progress
from .finishing import Finish
from .jobs import Job, require_claimed
from .previews import PreviewFile
from .samplers import Request, Sampler
from .videos import VideoOptions

__all__ = ["Opening", "Run", "RunOptions", "do_job", "do_jobs", "open_worker"]

Opening = Callable[[], AbstractContextManager[Sampler]]
"""Opens the model of a run."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the samples of a command line have in common."""

    finish: Finish
    schedule: Schedule
    negative: str
    unnamed: int | None
    """See `jobs.unnamed_seed`."""
    show: PreviewFile | None

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other runs, but for prompts and seeds."""
        chunks = {} if self.finish.chunks == 1 else {"chunks": self.finish.chunks}
        return chunks | {
            "model": str(self.finish.model.resolve()),
            "identity": self.finish.sampler.identity,
            "negative_prompt": self.negative,
            **schedule_json(self.schedule),
        }

    def settings(self, prompts: list[str]) -> dict[str, Any]:
        """What tells it from other runs over many prompts, but for seeds that are in the names of files."""
        video = {"fps": self.finish.video.fps, "crf": self.finish.video.crf, "decoder": self.finish.decoder}
        seed = {} if self.unnamed is None else {"seed": self.unnamed}
        return {**self.facts, **seed, "resolution": str(self.finish.sampler.resolution), "prompts": prompts, **video}

    def origin(self, job: Job) -> Origin:
        """What is written beside latents."""
        facts = {"prompt": job.prompt, "seed": job.seed, "schedule": self.schedule.name, **self.facts}
        sampler = self.finish.sampler
        return Origin(sampler.checkpoint_hash, sampler.resolution, json.loads(json.dumps(facts)))

    def latents(
        self, job: Job, callback: Callable[[Step], None], past: NDArray[np.float32] | None
    ) -> Iterator[NDArray[np.float32]]:
        """Sample a job, chunk by chunk, after those that are known."""
        request = Request(self.schedule, self.negative, job.seed, self.finish.chunks)
        return self.finish.sampler.latents(job.prompt, request, callback, self.show, past)


@dataclass(frozen=True)
class RunOptions:
    """What another process is told of a run, beside what it opens."""

    model: Path
    video: VideoOptions
    decoder: str | None
    chunks: int
    schedule: Schedule
    negative: str
    unnamed: int | None

    def start(self, sampler: Sampler, show: PreviewFile | None = None) -> Run:
        """The run of the model that is open."""
        finish = Finish(self.model, sampler, self.video, self.decoder, self.chunks)
        return Run(finish, self.schedule, self.negative, self.unnamed, show)


def do_job(job: Job, *, run: Run, keep: bool, quiet: bool) -> dict[str, Any]:
    """Do a job, unless its files are all there and may be kept: a run over many prompts goes on where it stopped."""
    schedule = run.schedule
    result: dict[str, Any] = {
        "prompt": job.prompt,
        "seed": job.seed,
        "schedule": schedule.name,
        **schedule_json(schedule),
        "files": [str(path) for path in job.files],
    }
    if keep and job.done:
        run.finish.forget(job)
        return {**result, "kept": True}
    start = time.perf_counter()
    with progress(quiet) as bar:
        callback = _stage_bars(bar, schedule, run.finish.chunks)
        run.finish.run(job, run.origin(job), lambda past: run.latents(job, callback, past), bar)
    seconds, spent = time.perf_counter() - start, run.finish.sampler.preview_seconds
    return {**result, "seconds": seconds, "preview_seconds": spent}


def open_worker(
    stack: ExitStack, *, opening: Opening, options: RunOptions, prompts: list[str]
) -> Callable[[Job], Result]:
    """What does jobs in another process, with a pipeline of its own: see `cluster.Open`.

    Raises:
        UsageError: the model cannot be opened there; a job's folder or the model is another one than here.
    """
    run, name = options.start(stack.enter_context(opening())), f"{socket.gethostname()}:{os.getpid()}"
    settings = run.settings(prompts)

    def do(job: Job) -> Result:
        require_claimed(job.output.parent, settings)
        return do_job(job, run=run, keep=True, quiet=True) | {"worker": name}

    return do


def do_jobs(
    jobs: Sequence[Job],
    do: Callable[[Job], Result],
    spread: Callable[[Sequence[Job]], Iterator[tuple[int, Result]]] | None,
) -> Iterator[tuple[Job, Result]]:
    """Jobs and their results as they come: one after another here, or what is left to do by workers."""
    todo = [] if spread is None else [job for job in jobs if not job.done]
    yield from ((job, do(job)) for job in jobs if job not in todo)
    if spread is not None and todo:
        for index, result in spread(todo):
            result.pop("kept", None)  # it was made in this run, by a worker that was lost before it could say so
            yield todo[index], result


def _stage_bars(bar: Progress, schedule: Schedule, chunks: int) -> Callable[[Step], None]:
    counts = [sum(map(len, levels)) for levels in zip(*map(schedule.levels_of, range(chunks)), strict=True)]
    stages = reversed(range(len(counts)))
    tasks = {stage: bar.add_task(f"stage {stage}", total=steps) for stage, steps in zip(stages, counts, strict=True)}
    return lambda step: bar.advance(tasks[step.plan.stage.index])
