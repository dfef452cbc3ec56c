"""Nothing that was sampled is lost: latents are on disk before they are decoded, until the video is there.

They always are, long or short the decoding: writing them takes milliseconds, a threshold would be a guess about a
machine on which nothing was decoded yet, and short runs are killed too.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.bundle.opening import is_bundle
from ..runtime.errors import UsageError
from ..runtime.pipeline.chunks import frame_count, split
from ..runtime.pipeline.latents import Origin, read_origin, remove_latents, save_latents
from .jobs import Job
from .samplers import Sampler
from .videos import VideoOptions, write_video

__all__ = ["Finish", "decode_latents"]

Latents = NDArray[np.float32]

Sample = Callable[[Latents | None], Iterator[Latents]]


@dataclass(frozen=True)
class Finish:
    """How a run's latents become its files."""

    model: Path
    sampler: Sampler
    video: VideoOptions
    decoder: str | None
    """What decodes, where it is not the first that is there."""

    chunks: int = 1
    """How many a video is made in."""

    def kept(self, job: Job) -> Path:
        """Where a job's latents are on disk until its files are there."""
        return job.latents_file if self.chunks == 1 else job.chunks_file

    def check(self, job: Job, origin: Origin) -> None:
        """Refuse to write over the latents of another run, whose decoding has not ended.

        Raises:
            UsageError: there are such latents.
        """
        file = self.kept(job)
        if file not in job.files and file.exists() and read_origin(file) != origin:
            raise UsageError(
                f"{file} holds latents of another run that was stopped: {self.way_on(job)}; "
                "remove it where their video is there, or not wanted"
            )

    def way_on(self, job: Job) -> str:
        """What a user does who has a job's latents and no video of them."""
        if not is_bundle(self.model) or self.chunks > 1:
            return "run the command that sampled them again, which goes on from them"
        words = ["pyrexport", "decode", f"{self.model}", f"{job.latents_file}", "-o", f"{job.output}"]
        words += self.video.words + ([] if self.decoder is None else ["--decoder", self.decoder])
        return f"go on with '{shlex.join(words)}'"

    def run(self, job: Job, origin: Origin, sample: Sample, bar: Progress) -> None:
        """Sample, unless a run that was stopped left these latents; decode, and remove them where nobody wants them.

        `sample` is given the latents of the chunks that such a run left, and gives those after them.
        """
        if self.chunks > 1:
            self._run_chunks(job, origin, sample, bar)
            return
        file = job.latents_file
        if job.latent_only:
            (latents,) = sample(None)
            save_latents(file, latents, origin)
            return
        if file not in job.files and file.exists():
            latents = np.load(file, allow_pickle=False)  # this run's: see `check`
            click.echo(f"{file}: going on from the latents of a run that was stopped", err=True)
        else:
            (latents,) = sample(None)
            save_latents(file, latents, origin)
        if not bar.disable:
            bar.console.print(f"latents: {file}", soft_wrap=True)
        with _noted(f"the latents are in {file}: {self.way_on(job)}"):
            decode_latents(job, self.sampler, [latents], 1, self.video, bar)
        self.forget(job)

    def _run_chunks(self, job: Job, origin: Origin, sample: Sample, bar: Progress) -> None:
        """The same for chunks: each is on disk before it is decoded, and decoded before the next is made."""
        file, past = job.chunks_file, None
        if file.exists():
            past = np.load(file, allow_pickle=False)  # this run's: see `check`
            click.echo(f"{file}: going on from the chunks of a run that was stopped", err=True)

        def chunks() -> Iterator[Latents]:
            made = [] if past is None else split(past, self.sampler.model, self.sampler.resolution)
            yield from list(made)
            for chunk in sample(past):
                made.append(chunk)
                save_latents(file, np.concatenate(made, axis=1), origin)
                yield chunk

        with _noted(f"the latents of finished chunks are in {file}: {self.way_on(job)}", lambda: file.exists()):
            if job.latent_only:
                for _ in chunks():
                    continue
            else:
                decode_latents(job, self.sampler, chunks(), self.chunks, self.video, bar)
        if job.latent_only or job.latents is not None:
            save_latents(job.latents_file, np.load(file, allow_pickle=False), origin)
        self.forget(job)

    def forget(self, job: Job) -> None:
        """Remove what was only kept until a job's files are there."""
        if self.kept(job) not in job.files:
            remove_latents(self.kept(job))


def decode_latents(
    job: Job, sampler: Sampler, chunks: Iterable[Latents], count: int, video: VideoOptions, bar: Progress
) -> None:
    """Write the video of the latents of chunks as they come, and its contact sheet."""
    total = frame_count(count, sampler.resolution, sampler.model.pyramid.geometry)
    task = bar.add_task("frames", total=total)
    encoding = video.encoding(sampler.frame_rate)
    write_video(job.output, job.sheet, sampler.decode(chunks, count), encoding, lambda n: bar.advance(task, n))


@contextmanager
def _noted(line: str, applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Errors say what else there is to know, where it applies: see `cli.main`."""
    try:
        yield
    except BaseException as error:
        if applies():
            error.add_note(line)
        raise
