"""What `sample` and `decode` have to do: a prompt and the files that it becomes."""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.documents import read_json
from ..runtime.errors import UsageError
from ..runtime.files import check_output, check_outside_bundles, write_whole
from ..runtime.pipeline.latents import origin_file
from ..runtime.pipeline.video import has_video_writer
from .videos import VideoOptions

__all__ = ["Job", "claim_folder", "make_jobs", "require_claimed", "unnamed_seed"]

SETTINGS_FILE = "samples.json"


@dataclass(frozen=True)
class Job:
    """A prompt, a seed and the files that they become."""

    prompt: str
    output: Path
    sheet: Path | None
    """Path of the contact sheet."""
    latents: Path | None
    """Path of the latents, where they are kept beside a video."""
    seed: int = 0

    @property
    def done(self) -> bool:
        """Whether all that it writes is there; an empty file is what a full disk or a lost connection leaves."""
        return all(path.exists() and path.stat().st_size > 0 for path in self.files)

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


def make_jobs(
    prompts: list[str],
    output: Path,
    video: VideoOptions,
    latents: Path | None,
    *,
    seeds: Sequence[int] = (0,),
    unnamed: int | None = None,
    many: bool,
) -> list[Job]:
    """A job for each prompt and seed; where there may be many, the output is a folder and files are named by number.

    Files of the seed `unnamed` are named by that alone: see `unnamed_seed`.

    Raises:
        UsageError: something could not be written.
    """
    if many:
        jobs = _many(prompts, output, video.grid, latents, seeds, unnamed)
    else:
        jobs = [_one(prompts[0], output, video.grid, latents, seeds[0])]
    for job in jobs:
        job.check(video)
    return jobs


def _one(prompt: str, output: Path, grid: str | None, latents: Path | None, seed: int) -> Job:
    sheet = None if grid is None else Path(grid) if grid else output.with_suffix(".png")
    job = Job(prompt, output, sheet, latents, seed)
    for path in job.files:
        check_output(path, folder=path.suffix == "")
        check_outside_bundles(path)
    for path in (job.latents_file, origin_file(job.latents_file)):
        check_output(path)
    if not output.suffix and output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty: frames go to a folder of their own; choose another")
    return job


def _many(
    prompts: list[str],
    output: Path,
    grid: str | None,
    latents: Path | None,
    seeds: Sequence[int],
    unnamed: int | None,
) -> list[Job]:
    if grid or latents is not None:
        raise UsageError("with --prompts, give --grid without a file, and no --save-latents: files are named by number")
    if output.suffix:
        raise UsageError(f"with --prompts the output is a folder, found '{output.name}'")
    check_output(output, folder=True)
    check_outside_bundles(output)
    suffix = ".mp4" if has_video_writer() else ".npz"
    jobs = []
    for index, prompt in enumerate(prompts):
        for seed in seeds:
            of = "" if seed == unnamed else f"-seed{seed}"
            name = output / f"{index:04d}{of}{suffix}"
            jobs.append(Job(prompt, name, None if grid is None else name.with_suffix(".png"), None, seed))
    return jobs


def unnamed_seed(output: Path, seeds: Sequence[int]) -> int | None:
    """The seed whose files are named without it: the only one that the folder of many prompts began with.

    Raises:
        UsageError: the folder does not say what is in it.
    """
    file = output / SETTINGS_FILE
    if file.is_file():
        return _read_settings(file).get("seed")
    return seeds[0] if len(seeds) == 1 else None


def claim_folder(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a run over many prompts, or make sure that what is there belongs to such a run.

    Other seeds may be added to it.

    Raises:
        UsageError: the folder holds something else.
    """
    output.mkdir(exist_ok=True)
    file = output / SETTINGS_FILE
    if file.is_file():
        if _read_settings(file) != settings:
            raise UsageError(f"{output} holds samples of other prompts or settings: choose another folder")
    elif any(output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no {SETTINGS_FILE}: choose another folder")
    else:
        write_whole(file, json.dumps(settings, indent=1).encode())


def require_claimed(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that is not the one that a run on another machine claimed, or a model that is not the same.

    Raises:
        UsageError: it is so.
    """
    file = output / SETTINGS_FILE
    if not file.is_file() or read_json(file) != settings:
        raise UsageError(
            f"{output} on {socket.gethostname()} is not the folder of this run, or the bundle there is another one: "
            "all machines must see both under the same paths"
        )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except UsageError as error:
        raise UsageError(f"{error}: nothing tells whose videos lie beside it; choose another folder") from None
