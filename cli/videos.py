"""Frames to the files that are asked for: what `sample` and `decode` share."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle.entries import MAX_FRAME_RATE
from ..runtime.pipeline.video import CRF, Encoding, contact_sheet, open_frames, write_png

__all__ = ["VideoOptions", "video_options", "write_video"]

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoOptions:
    """How a video is written, as far as it is said."""

    grid: str | None = None
    """Path of the contact sheet; empty: beside the output."""
    fps: float | None = None
    crf: int | None = None

    @property
    def given(self) -> list[str]:
        """The flags of an .mp4 that are given."""
        return [flag for flag, value in (("--fps", self.fps), ("--crf", self.crf)) if value is not None]

    @property
    def words(self) -> list[str]:
        """The command line that says the same."""
        values = (("--grid", self.grid or None), ("--fps", self.fps), ("--crf", self.crf))
        return [word for flag, value in values if value is not None for word in (flag, f"{value}")] + (
            ["--grid"] if self.grid == "" else []
        )

    def encoding(self, frame_rate: int) -> Encoding:
        """Of a model's videos."""
        return Encoding(frame_rate if self.fps is None else self.fps, CRF if self.crf is None else self.crf)


class _Rate(click.FloatRange):
    """A number within a range; what is no number lies outside all of them, and passes each comparison."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def video_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--grid`, `--fps` and `--crf`, as one argument `video`."""

    @wraps(command)
    def wrapped(*arguments: Any, grid: str | None, fps: float | None, crf: int | None, **others: Any) -> Any:
        return command(*arguments, video=VideoOptions(grid, fps, crf), **others)

    sheet = "Also a PNG contact sheet, by default beside the output."
    rate = _Rate(1, MAX_FRAME_RATE)
    quality = f"Of an .mp4: constant rate factor, lower is better; {CRF} where it is not given."
    decorated: Callable[..., Any] = wrapped
    for option in (
        click.option("--crf", type=click.IntRange(0, 51), help=quality),
        click.option("--fps", type=rate, help="Of an .mp4: frames a second, in place of the model's own."),
        click.option("--grid", is_flag=False, flag_value="", default=None, metavar="[FILE]", help=sheet),
    ):
        decorated = option(decorated)
    return decorated


def write_video(
    output: Path,
    sheet: Path | None,
    frames: Iterable[Frames],
    encoding: Encoding,
    advance: Callable[[int], None],
) -> None:
    """Write frames as they come, and the contact sheet where one is asked for; `advance` is told their number."""
    picked: list[Frames] = []
    with open_frames(output, encoding) as write:
        for piece in frames:
            write(piece)
            if sheet is not None:
                picked.append(piece)
            advance(len(piece))
    if sheet is not None:
        write_png(sheet, contact_sheet([np.concatenate(picked)]))
