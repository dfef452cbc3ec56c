"""Frames of both sides: kept while videos are compared, and shown side by side."""

import math
from base64 import b64encode
from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from ...runtime.pipeline.video import contact_sheet, encode_png
from .page import section, tag
from .subject import Subject

__all__ = ["FramePairs", "Kept"]

Frames = NDArray[np.uint8]
Kept = dict[int, list[tuple[int, Frames, Frames]]]
"""Of each run: a frame's number, and the frame of both sides."""

COLUMNS = 6
"""Frames of a run that are shown."""

RUNS = 4
"""Runs that are shown."""

WIDEST = 240
"""Pixels of a frame along an axis: larger ones are shown by every nth pixel of both axes."""


class FramePairs:
    """Takes videos as they are compared, and keeps a few frames of the first runs."""

    def __init__(self) -> None:
        """With none."""
        self.kept: Kept = {}

    def __call__(self, run: int, start: int, found: Frames, reference: Frames) -> None:
        """Take frames [n, H, W, 3] from number `start` on, beside all those of the reference [T, H, W, 3]."""
        if run >= RUNS:
            return
        for frame in _spread(len(reference)):
            if start <= frame < start + len(found):
                pair = (frame, found[frame - start].copy(), reference[frame].copy())
                self.kept.setdefault(run, []).append(pair)

    def section(self, subject: Subject) -> Element:
        """What was kept, as a part of the page."""
        if not self.kept:
            words = "None: no video was decoded, or the reference was recorded without frames."
            return section("Frames", tag("p", words, class_="note"))
        left = len(subject.runs) - len(self.kept)
        note = [tag("p", f"{left} more runs are not shown.", class_="note")] if left else []
        return section("Frames", *(self._figure(run, subject.name(run)) for run in self.kept), *note)

    def _figure(self, run: int, name: str) -> Element:
        picks, *sides = zip(*self.kept[run], strict=True)
        found, reference = map(np.stack, sides)
        difference = np.abs(found.astype(np.int16) - reference).astype(np.uint8)
        largest, factor = _magnified(difference)
        rows = {
            "reference": reference,
            "bundle": found,
            f"difference ×{factor}": (difference * np.uint8(factor)).astype(np.uint8),
        }
        cells = [
            cell
            for words, clip in rows.items()
            for cell in (tag("span", words), tag("img", src=_image(clip), alt=f"{words}, {name}"))
        ]
        numbers = ", ".join(str(frame + 1) for frame in picks)
        caption = f"{name}. Frames {numbers}; the largest difference here is {largest} of 255."
        return tag("figure", tag("div", *cells, class_="frames"), tag("figcaption", caption))


def _spread(frames: int) -> list[int]:
    """Frames that are shown of a video of so many, from its first to its last."""
    return [int(frame) for frame in np.linspace(0, frames - 1, min(COLUMNS, frames)).round()]


def _magnified(difference: Frames) -> tuple[int, int]:
    """The largest difference, and the power of two that makes it as bright as can be; 1 where there is none."""
    largest = int(difference.max())
    return largest, 2 ** int(math.log2(255 / largest)) if largest else 1


def _image(clip: Sequence[Frames] | Frames) -> str:
    """Frames side by side as a data URL."""
    frames = np.asarray(clip)
    every = -(-max(frames.shape[1:3]) // WIDEST)
    sheet = contact_sheet([np.ascontiguousarray(frames[:, ::every, ::every])], columns=len(frames))
    return "data:image/png;base64," + b64encode(encode_png(sheet)).decode()
