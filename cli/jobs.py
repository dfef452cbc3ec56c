"""What `sample` and `decode` have to do: a prompt and the files that it becomes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.documents import read_json
from ..runtime.errors import UsageError
from ..runtime.files import check_output, write_whole
from ..runtime.pipeline.latents import origin_file
from ..runtime.pipeline.video import has_video_writer
from .videos import VideoOptions

__all__ = ["Job", "claim_folder", "make_jobs"]


@dataclass(frozen=True)
class Job:
    """A prompt and the files that it becomes."""

    prompt: str
    output: Path
    sheet: Path | None
    """Path of the contact sheet."""
    latents: Path | None
    """Path of the latents, where they are kept beside a video."""

    @property
    def files(self) -> list[Path]:
        """All that it writes."""
        return [path for path in (self.output, self.sheet, self.latents) if path is not None]

    @property
    def latents_file(self) -> Path:
        """Where latents are before decoding starts: where they are kept, or beside the output until it is there."""
        if self.latent_only:
            return self.output
        return self.latents or self.chunks_file

    @property
    def chunks_file(self) -> Path:
        """Where the latents of finished chunks are, until all are there and what is made of them."""
        return self.output.with_name(f"{self.output.name}.latents.npy")

    @property
    def latent_only(self) -> bool:
        """Whether latents are all that is asked for."""
        return self.output.suffix == ".npy"

    def check(self, video: VideoOptions) -> None:
        """Refuse before the work what could not be written after it."""
        if self.output.suffix not in (".mp4", ".npy", ".npz", ""):
            raise UsageError(
                f"expected an output that ends in .mp4, in .npy for latents or .npz for frames, or a folder for PNG; "
                f"found '{self.output.name}'"
            )
        if self.output.suffix == ".mp4" and not has_video_writer():
            raise UsageError(
                "writing mp4 needs PyAV: pip install 'pyrexport[video]', or give a folder for PNG files or a .npz"
            )
        if self.sheet is not None and (self.latent_only or self.sheet.suffix != ".png"):
            raise UsageError(
                f"a contact sheet is a .png beside a video; found '{self.sheet.name}' for '{self.output.name}'"
            )
        if self.latents is not None and self.latent_only:
            raise UsageError(f"'{self.output.name}' holds the latents already: --save-latents is for videos")
        if self.latents is not None and self.latents.suffix != ".npy":
            raise UsageError(f"latents are written as .npy, found '{self.latents.name}'")
        if video.given and self.output.suffix != ".mp4":
            raise UsageError(f"'{self.output.name}' is no .mp4: leave out {', '.join(video.given)}")


def make_jobs(prompts: list[str], output: Path, video: VideoOptions, latents: Path | None, *, many: bool) -> list[Job]:
    """A job for each prompt; where there are many, the output is a folder and files are named by number.

    Raises:
        UsageError: something could not be written.
    """
    make = _many if many else _one
    jobs = make(prompts, output, video.grid, latents)
    for job in jobs:
        job.check(video)
    return jobs


def _one(prompts: list[str], output: Path, grid: str | None, latents: Path | None) -> list[Job]:
    sheet = None if grid is None else Path(grid) if grid else output.with_suffix(".png")
    job = Job(prompts[0], output, sheet, latents)
    for path in job.files:
        check_output(path, folder=path.suffix == "")
    for path in (job.latents_file, origin_file(job.latents_file)):
        check_output(path)
    if not output.suffix and output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty: frames go to a folder of their own; choose another")
    return [job]


def _many(prompts: list[str], output: Path, grid: str | None, latents: Path | None) -> list[Job]:
    if grid or latents is not None:
        raise UsageError("with --prompts, give --grid without a file, and no --save-latents: files are named by number")
    if output.suffix:
        raise UsageError(f"with --prompts the output is a folder, found '{output.name}'")
    check_output(output, folder=True)
    suffix = ".mp4" if has_video_writer() else ".npz"
    names = [output / f"{index:04d}{suffix}" for index in range(len(prompts))]
    sheets = [None if grid is None else name.with_suffix(".png") for name in names]
    return [Job(prompt, name, sheet, None) for prompt, name, sheet in zip(prompts, names, sheets, strict=True)]


def claim_folder(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a run over many prompts, or make sure that what is there belongs to the same run.

    Raises:
        UsageError: the folder holds something else.
    """
    output.mkdir(exist_ok=True)
    file = output / "samples.json"
    if file.is_file():
        if read_json(file) != settings:
            raise UsageError(f"{output} holds samples of other prompts or settings: choose another folder")
    elif any(output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no samples.json: choose another folder")
    else:
        write_whole(file, json.dumps(settings, indent=1).encode())
