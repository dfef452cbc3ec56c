"""Measuring a bundle: each graph's latency, the chain, the glue between engines, and memory."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.engines import EngineOptions
from ..bundle.tiles import TilePlan
from ..chain.pyramid import VAE_SPATIAL
from ..pipeline.pipeline import Pipeline, load

__all__ = ["PROCESS_BYTES", "MemoryWatch", "measure_bundle", "predicted_peaks"]

PROCESS_BYTES = 40 * 2**20
"""Anonymous memory of Python, NumPy and an engine that is open, before it runs: measured with ONNX Runtime 1.31."""


def predicted_peaks(memory: Mapping[str, int | None], tiles: TilePlan | None, frames: int) -> dict[str, int]:
    """Peak of anonymous memory of a process that runs each graph, and of one that samples, engines one at a time.

    Args:
        memory: of each graph, as `export.memory` plans it or a target measured it; None where it is not known.
        tiles: that frames are decoded in, if there is a decoder.
        frames: of the video.
    """
    peaks = {name: PROCESS_BYTES + nbytes for name, nbytes in memory.items() if nbytes is not None}
    if tiles is not None and tiles.count > 1:  # the whole video waits for its last tile
        canvas = frames * 3 * VAE_SPATIAL**2 * tiles.frame[0] * tiles.frame[1] * 4
        peaks |= {name: nbytes + canvas for name, nbytes in peaks.items() if name.startswith("vae_")}
    return peaks | ({"sample": max(peaks.values())} if len(peaks) == len(memory) else {})


class MemoryWatch:
    """Peak anonymous memory of this process, sampled every 20 ms, and its peak resident memory, mapped files included."""

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
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self.anonymous = max(self.anonymous, self._field("RssAnon"))
        self._stop.set()
        self._thread.join()


def measure_bundle(
    folder: Path,
    *,
    runs: int,
    engine: EngineOptions,
    schedule: str | None = None,
    between: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Sample a bundle several times on noise embeddings, engines resident.

    Args:
        folder: of the bundle.
        runs: how many are counted, after one to warm up.
        engine: how graphs are opened.
        schedule: in place of the default.
        between: called after each run, so that another program can take its turn.
        advance: called after each run.

    Returns:
        Seconds per graph (`min`, `median` of a call, `load`), of the chain, the share of the glue in it, and peak memory.
    """
    with MemoryWatch() as memory, load(folder, resident=True, **vars(engine)) as pipeline:
        loads = _load_all(pipeline)
        shape = (pipeline.model.text_length, pipeline.bundle.manifest.config.text_dim)
        text = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        plan = pipeline.model.schedule(schedule)
        timings = []
        for index in range(runs + 1):
            result = pipeline(
                schedule=schedule, prompt_embeds=text, negative_prompt_embeds=text, output_type="latent", seed=index
            )
            if index:
                timings.append(result.timings)
                between()
                advance()
        decode = _time_decode(pipeline)
    calls = {
        f"stage{stage.index}": steps * (2 if plan.guided else 1)
        for stage, steps in zip(reversed(pipeline.model.pyramid.stages), plan.steps, strict=True)
    }
    graphs = {
        name: _summary([t.engine[name] / count for t in timings]) | {"calls": count, "load": loads[name]}
        for name, count in calls.items()
    }
    graphs |= {
        name: _summary(times) | {"calls": calls_, "load": loads[name]} for name, (times, calls_) in decode.items()
    }
    chains = [t.denoise for t in timings]
    return {
        "bundle": str(folder),
        "schedule": plan.name,
        "graphs": graphs,
        "chain": _summary(chains),
        "glue_share": statistics.median(t.glue / t.denoise for t in timings),
        "peak_anonymous_bytes": memory.anonymous,
        "peak_rss_bytes": memory.resident,
    }


def _summary(times: list[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times)}


def _load_all(pipeline: Pipeline) -> dict[str, float]:
    loads = {}
    for name in pipeline.bundle.manifest.graphs:
        before = pipeline.timings.load
        pipeline.open(name)
        loads[name] = pipeline.timings.load - before
    return loads


def _time_decode(pipeline: Pipeline) -> dict[str, tuple[list[float], int]]:
    """Seconds of the decoder's graphs over three latent frames of a tile."""
    if pipeline.bundle.manifest.vae is None:
        return {}
    tiles = pipeline.bundle.manifest.vae.tiles
    channels, frames, *_ = pipeline.model.pyramid.stages[0].latent
    times: dict[str, tuple[list[float], int]] = {"vae_first": ([], tiles.count)}
    if frames > 1:
        times["vae_next"] = ([], tiles.count * (frames - 1))
    start = time.perf_counter()
    for index, _ in enumerate(pipeline.decode_tile(np.zeros((channels, min(frames, 3), *tiles.tile), np.float32))):
        now = time.perf_counter()
        times["vae_next" if index else "vae_first"][0].append(now - start)
        start = now
    return times
