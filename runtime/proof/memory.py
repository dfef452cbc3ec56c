"""Memory: what a process takes while it is watched, and what a bundle is expected to take."""

import threading
from collections.abc import Mapping
from pathlib import Path

from ..bundle.graphs import Decoder, GraphKey

__all__ = ["MemoryWatch", "predicted_peaks"]


def predicted_peaks(
    memory: Mapping[GraphKey, int | None], decoder: Decoder | None, frames: int, process_bytes: int
) -> dict[str, int]:
    """Peak of anonymous memory of a process that runs each graph, and of one that samples, engines one at a time.

    Args:
        memory: bytes that each graph takes, as its target plans or measured them; None where they are not known.
        decoder: how frames are decoded, where they are.
        frames: how many the video has.
        process_bytes: see `Target.process_bytes`.

    Returns:
        Bytes by the graph's name, and of `sample` where all graphs are known.
    """
    canvas = 0
    if decoder is not None and decoder.tiles.count > 1:  # the whole video waits for its last tile
        tiles = decoder.tiles
        canvas = frames * 3 * tiles.spatial**2 * tiles.frame[0] * tiles.frame[1] * 4
    peaks = {
        key.name: process_bytes + nbytes + (canvas if decoder is not None and key.decoder == decoder.component else 0)
        for key, nbytes in memory.items()
        if nbytes is not None
    }
    idle = {key.name for key in memory if key.decoder and decoder is not None and key.decoder != decoder.component}
    known = len(peaks) == len(memory)
    return peaks | ({"sample": max(nbytes for name, nbytes in peaks.items() if name not in idle)} if known else {})


class MemoryWatch:
    """Peak anonymous memory of this process, sampled every 20 ms, and its peak resident memory with mapped files."""

    def __init__(self) -> None:
        """Not yet watching: use it as a context manager."""
        self.anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def _field(name: str) -> int:
        """A field of /proc/self/status in bytes; 0 where there is no such file."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.anonymous = max(self.anonymous, self._field("RssAnon"))

    @property
    def resident(self) -> int:
        """Peak resident memory since the process began."""
        return self._field("VmHWM")

    def __enter__(self) -> "MemoryWatch":
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Look once more, and stop watching."""
        self.anonymous = max(self.anonymous, self._field("RssAnon"))
        self._stop.set()
        self._thread.join()
