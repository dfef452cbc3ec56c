"""Frames to files: mp4 through PyAV, PNG through the standard library."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..files import written_beside

__all__ = [
    "FPS",
    "VideoWriter",
    "contact_sheet",
    "has_video_writer",
    "open_frames",
    "save_array",
    "write_png",
]

FPS = 16
"""Frames per second of Wan's training videos."""

Frames = NDArray[np.uint8]


class VideoWriter(Protocol):
    """Takes frames [T, H, W, 3], uint8, as they come."""

    def __call__(self, frames: Frames, /) -> None:
        """Append frames."""
        ...


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array as .npy."""
    with written_beside(path) as partial:
        np.save(partial, array)


def has_video_writer() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


@contextmanager
def open_frames(path: Path) -> Iterator[VideoWriter]:
    """A writer of frames: .mp4 through PyAV, .npz as one array `frames`, and a folder as one PNG a frame.

    A file or a folder appears when all frames are in it.

    Raises:
        UsageError: PyAV is needed and not installed, or the suffix is another.
    """
    if path.suffix == ".mp4":
        with _open_mp4(path) as write:
            yield write
    elif path.suffix == ".npz":
        kept: list[Frames] = []
        yield kept.append
        with written_beside(path) as partial:
            np.savez_compressed(partial, frames=np.concatenate(kept))
    elif path.suffix == "":
        with TemporaryDirectory(prefix=".", suffix=".partial", dir=path.absolute().parent) as outer:
            partial, count = Path(outer) / "frames", 0
            partial.mkdir()

            def write_pngs(frames: Frames) -> None:
                nonlocal count
                for frame in frames:
                    write_png(partial / f"{count:05d}.png", frame)
                    count += 1

            yield write_pngs
            partial.replace(path)  # onto nothing or an empty folder
    else:
        raise UsageError(f"frames are written as .mp4, .npz or a folder of PNG files, found '{path.name}'")


@contextmanager
def _open_mp4(path: Path) -> Iterator[VideoWriter]:
    try:
        import av
    except ImportError:
        raise UsageError("writing mp4 needs PyAV: pip install 'pyrexport[video]'") from None
    with written_beside(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"crf": "15"})
        started = False

        def write(frames: Frames) -> None:
            nonlocal started
            if not started:
                stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
                started = True
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
    """Write an image [H, W, 3], uint8, as PNG."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    with written_beside(path) as partial:
        partial.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
