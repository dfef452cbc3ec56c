"""Nothing that was sampled is lost: latents are on disk before they are decoded, until the video is there.

They always are, long or short the decoding: writing them takes milliseconds, a threshold would be a guess about a
machine on which nothing was decoded yet, and short runs are killed too.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.bundle.opening import is_bundle
from ..runtime.errors import UsageError
from ..runtime.pipeline.latents import Origin, read_origin, remove_latents, save_latents
from .jobs import Job
from .samplers import Sampler
from .videos import VideoOptions, write_video

__all__ = ["Finish", "decode_latents"]

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Finish:
    """How a run's latents become its files."""

    model: Path
    sampler: Sampler
    video: VideoOptions
    decoder: str | None
    """What decodes, where it is not the first that is there."""

    def check(self, job: Job, origin: Origin) -> None:
        """Refuse to write over the latents of another run, whose decoding has not ended.

        Raises:
            UsageError: there are such latents.
        """
        file = job.latents_file
        if file not in job.files and file.exists() and read_origin(file) != origin:
            raise UsageError(
                f"{file} holds latents of another run that was stopped: {self.way_on(job)}; "
                "remove it where their video is there, or not wanted"
            )

    def way_on(self, job: Job) -> str:
        """What a user does who has a job's latents and no video of them."""
        if not is_bundle(self.model):
            return "run the command that sampled them again, which goes on from them"
        words = ["pyrexport", "decode", f"{self.model}", f"{job.latents_file}", "-o", f"{job.output}"]
        words += self.video.words + ([] if self.decoder is None else ["--decoder", self.decoder])
        return f"go on with '{shlex.join(words)}'"

    def run(self, job: Job, origin: Origin, sample: Callable[[], Latents], bar: Progress) -> None:
        """Sample, unless a run that was stopped left these latents; decode, and remove them where nobody wants them."""
        file = job.latents_file
        if job.latent_only:
            save_latents(file, sample(), origin)
            return
        if file not in job.files and file.exists():
            latents = np.load(file, allow_pickle=False)  # this run's: see `check`
            click.echo(f"{file}: going on from the latents of a run that was stopped", err=True)
        else:
            latents = sample()
            save_latents(file, latents, origin)
        if not bar.disable:
            bar.console.print(f"latents: {file}", soft_wrap=True)
        with _noted(f"the latents are in {file}: {self.way_on(job)}"):
            decode_latents(job, self.sampler, latents, self.video, bar)
        self.forget(job)

    def forget(self, job: Job) -> None:
        """Remove what was only kept until a job's files are there."""
        if job.latents_file not in job.files:
            remove_latents(job.latents_file)


def decode_latents(job: Job, sampler: Sampler, latents: Latents, video: VideoOptions, bar: Progress) -> None:
    """Write the video of latents, and its contact sheet."""
    task = bar.add_task("frames", total=sampler.resolution.frames)
    encoding = video.encoding(sampler.frame_rate)
    write_video(job.output, job.sheet, sampler.decode(latents), encoding, lambda n: bar.advance(task, n))


@contextmanager
def _noted(line: str) -> Iterator[None]:
    """Errors say what else there is to know: see `cli.main`."""
    try:
        yield
    except BaseException as error:
        error.add_note(line)
        raise
