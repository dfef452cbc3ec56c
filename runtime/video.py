"""Frames to files: mp4 through PyAV, PNG through the standard library."""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

__all__ = ["FPS", "VideoWriter", "check_output", "contact_sheet", "open_video", "write_png", "written_beside"]

FPS = 16
"""Frames per second of Wan's training videos."""

Frames = NDArray[np.uint8]


class VideoWriter(Protocol):
    """Takes frames [T, H, W, 3], uint8, as they come."""

    def __call__(self, frames: Frames) -> None:
        """Append frames."""
        ...


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before the work that it is for.

    Raises:
        UsageError: its folder is missing or not writable, it is a folder itself, or its name is too long.
    """
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} of the output does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"folder {path.parent} of the output is not writable; choose another")
    if len(os.fsencode(path.name)) > 255:
        raise UsageError(f"the name of the output is longer than 255 bytes: {path.name[:40]}…")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: expected the name of a file")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when all went well and removed when not."""
    check_output(path)
    partial = path.with_name(f".{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_video(path: Path, height: int, width: int) -> Iterator[VideoWriter]:
    """A writer of H.264 in mp4; the file appears when all frames are in it.

    Raises:
        UsageError: PyAV is not installed, or the suffix is not .mp4.
    """
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"a video is written as .mp4, found '{path.name}'")
    try:
        import av
    except ImportError:
        raise UsageError("writing mp4 needs PyAV: pip install 'pyrexport[video]'") from None
    with written_beside(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"crf": "15"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"

        def write(frames: Frames) -> None:
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield write
        container.mux(stream.encode(None))


def contact_sheet(clips: Sequence[Frames], columns: int = 6) -> Frames:
    """One image [H, W, 3] with a row per clip: `columns` frames spread over its length, two pixels apart."""
    rows = []
    for clip in clips:
        picks = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        cells = [np.pad(clip[i], ((1, 1), (1, 1), (0, 0)), constant_values=255) for i in picks]
        rows.append(np.concatenate(cells, axis=1))
    return np.concatenate(rows, axis=0)


def write_png(path: Path, image: Frames) -> None:
    """An image [H, W, 3], uint8, as PNG."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    with written_beside(path) as partial:
        partial.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
