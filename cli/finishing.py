"""Nothing that was sampled is lost: latents are on disk before they are decoded, until the video is there.

They always are, long or short the decoding: writing them takes milliseconds, a threshold would be a guess about a
machine on which nothing was decoded yet, and short runs are killed too.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.bundle.opening import is_bundle
from ..runtime.errors import UsageError, noted
from ..runtime.pipeline.chunks import frame_count, split
from ..runtime.pipeline.latents import Origin, origin_file, read_left_latents, read_origin, remove_latents, save_latents
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

    def check(self, job: Job, origin: Origin) -> None:
        """Refuse to begin beside the latents of another run, whose decoding has not ended.

        Raises:
            UsageError: there are such latents.
        """
        file = job.chunks_file
        found = read_origin(file) if file.exists() else origin
        if file in job.files or found == origin:
            return
        if found is None:
            raise UsageError(
                f"{file} holds latents, and nothing beside them ({origin_file(file).name}) says of which run: "
                "give the file another name, or remove it where they are not wanted"
            )
        raise UsageError(
            f"{file} holds latents of another run that was stopped: {self.way_on(job, file)}; "
            "remove it where their video is there, or not wanted"
        )

    def way_on(self, job: Job, file: Path) -> str:
        """What a user does who has a job's latents in a file and no video of them."""
        if not is_bundle(self.model) or self.chunks > 1 or job.latent_only:
            return "run the command that sampled them again, which goes on from them"
        words = ["pyrexport", "decode", f"{self.model}", f"{file}", "-o", f"{job.output}"]
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
            latents = self._left(file)
            click.echo(f"{file}: going on from the latents of a run that was stopped", err=True)
        else:
            (latents,) = sample(None)
            save_latents(file, latents, origin)
        if not bar.disable:
            bar.console.print(f"latents: {file}", soft_wrap=True)
        with noted(f"the latents are in {file}: {self.way_on(job, file)}"):
            decode_latents(job, self.sampler, [latents], 1, self.video, bar)
        self.forget(job)

    def _run_chunks(self, job: Job, origin: Origin, sample: Sample, bar: Progress) -> None:
        """The same for chunks: each is on disk before it is decoded, and decoded before the next is made."""
        file, past = job.chunks_file, None
        made: list[Latents] = []
        if file.exists():
            past = self._left(file)
            made += split(past, self.sampler.model, self.sampler.resolution)
            click.echo(f"{file}: going on from the chunks of a run that was stopped", err=True)

        def chunks() -> Iterator[Latents]:
            yield from list(made)
            for chunk in sample(past):
                made.append(chunk)
                save_latents(file, np.concatenate(made, axis=1), origin)
                yield chunk

        with noted(f"the latents of finished chunks are in {file}: {self.way_on(job, file)}", lambda: file.exists()):
            if job.latent_only:
                for _ in chunks():
                    continue
            else:
                decode_latents(job, self.sampler, chunks(), self.chunks, self.video, bar)
        if job.latent_only or job.latents is not None:
            save_latents(job.latents_file, np.concatenate(made, axis=1), origin)
        self.forget(job)

    def _left(self, file: Path) -> Latents:
        """What this run left that was stopped: whose it is says `check`."""
        with noted(f"remove {file} to sample it again"):
            return read_left_latents(file, self.sampler.model, self.sampler.resolution, self.chunks)

    def forget(self, job: Job) -> None:
        """Remove what was only kept until a job's files are there."""
        if job.chunks_file not in job.files:
            remove_latents(job.chunks_file)


def decode_latents(
    job: Job, sampler: Sampler, chunks: Iterable[Latents], count: int, video: VideoOptions, bar: Progress
) -> None:
    """Write the video of the latents of chunks as they come, and its contact sheet."""
    total = frame_count(count, sampler.resolution, sampler.model.pyramid.geometry)
    task = bar.add_task("frames", total=total)
    encoding = video.encoding(sampler.frame_rate)
    write_video(job.output, job.sheet, sampler.decode(chunks, count), encoding, lambda n: bar.advance(task, n))
