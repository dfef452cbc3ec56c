"""Frames to files: mp4 through PyAV, in the colours of BT.709, PNG through the standard library."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..files import written_beside

__all__ = [
    "CRF",
    "Encoding",
    "VideoWriter",
    "contact_sheet",
    "encode_png",
    "enlarge",
    "has_video_writer",
    "open_frames",
    "save_array",
    "write_gif",
    "write_png",
]

CRF = 15
"""Constant rate factor where none is given: losses that can't be seen."""

BT709 = 1
"""ITU-R BT.709 in ISO/IEC 23091-2, where its matrix, its primaries and its transfer have the same number."""

LIMITED = 1
"""The range "tv" in FFmpeg's numbers: luma within 16 … 235."""

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Encoding:
    """How frames become an .mp4."""

    fps: float
    """Frames a second."""
    crf: int = CRF
    """Constant rate factor, from 0 (nothing lost) to 51."""


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
def open_frames(path: Path, encoding: Encoding) -> Iterator[VideoWriter]:
    """A writer of frames: .mp4 through PyAV, .npz as one array `frames`, and a folder as one PNG a frame.

    A file or a folder appears when all frames are in it. An .mp4 is H.264 in yuv420p, of even sizes (the last row or
    column is repeated where there is an odd one out), its index at the start; its colours are converted with BT.709's
    matrix into the limited range, and it says so.

    Raises:
        UsageError: PyAV is needed and not installed, or the suffix is another.
    """
    if path.suffix == ".mp4":
        with _open_mp4(path, encoding) as write:
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
def _open_mp4(path: Path, encoding: Encoding) -> Iterator[VideoWriter]:
    av = _pyav("writing mp4")
    options, rate = {"movflags": "+faststart"}, Fraction(encoding.fps).limit_denominator(1001)
    with written_beside(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(encoding.crf)})
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        started = False

        def write(frames: Frames) -> None:
            nonlocal started
            odd_height, odd_width = (size % 2 for size in frames.shape[1:3])
            even = np.pad(frames, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
            if not started:
                stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
                started = True
            for image in even:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                yuv = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
                container.mux(stream.encode(yuv))

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


def enlarge(frames: Frames, factor: int) -> Frames:
    """Frames [T, H, W, 3] with each pixel `factor` times as high and as wide."""
    return np.repeat(np.repeat(frames, factor, 1), factor, 2)


def write_gif(path: Path, frames: Frames, fps: float) -> None:
    """Write frames [T, H, W, 3], uint8, as a GIF that plays again and again; what is made again need not be durable.

    Raises:
        UsageError: PyAV is not installed.
    """
    av = _pyav("writing a .gif")
    rate = Fraction(fps).limit_denominator(1001)
    with written_beside(path, durable=False) as partial, av.open(str(partial), "w", format="gif") as container:
        stream: Any = container.add_stream("gif", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb8"
        stream.codec_context.thread_count = 1
        # Three bits of red and green, two of blue. FFmpeg's own conversion starts threads for a millisecond's work.
        red, green, blue = (np.rint(frames[..., c] * np.float32(most / 255)) for c, most in enumerate((7, 7, 3)))
        for image in (red * 32 + green * 4 + blue).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb8")))
        container.mux(stream.encode(None))


def _pyav(purpose: str) -> Any:
    try:
        import av
    except ImportError:
        raise UsageError(f"{purpose} needs PyAV: pip install 'pyrexport[video]'") from None
    return av


def encode_png(image: Frames) -> bytes:
    """An image [H, W, 3], uint8, as PNG."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def write_png(path: Path, image: Frames, *, durable: bool = True) -> None:
    """Write an image [H, W, 3], uint8, as PNG."""
    with written_beside(path, durable=durable) as partial:
        partial.write_bytes(encode_png(image))
