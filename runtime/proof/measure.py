"""Measuring a bundle: each graph's latency, the chain, the glue between engines, and memory."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.engines import EngineOptions
from ..bundle.graphs import Decoder, decoder_key, stage_key
from ..chain.plan import plan
from ..chain.pyramid import Resolution
from ..pipeline.pipeline import Pipeline, load
from ..pipeline.timings import Timings
from .memory import MemoryWatch

__all__ = ["measure_bundle"]


def measure_bundle(
    folder: Path,
    *,
    runs: int,
    engine: EngineOptions,
    schedule: str | None = None,
    resolution: Resolution | None = None,
    between: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Sample a bundle several times on noise embeddings, engines resident.

    Args:
        folder: the bundle's folder.
        runs: how many are counted, after one to warm up.
        engine: how graphs are opened.
        schedule: a schedule's name, in place of the default.
        resolution: one of the bundle's; None: its first.
        between: called after each run, so that another program can take its turn.
        advance: called after each run.

    Returns:
        Seconds per graph (`min`, `median` of a call, `load`) and of the chain, the glue's share of it, and peak memory.
    """
    opening: dict[str, Any] = {"resolution": resolution, "threads": engine.threads, **engine.own}
    with MemoryWatch() as memory, load(folder, resident=True, **opening) as pipeline:
        loads, timings = _load_all(pipeline), list[Timings]()
        _time_chain(pipeline, schedule, seed=runs)  # to warm up
        for seed in range(runs):
            timings.append(_time_chain(pipeline, schedule, seed))
            between()
            advance()
        decode, calls = _time_decode(pipeline), _calls(pipeline, schedule)
    graphs = {name: ([t.engine[name] / count for t in timings], count) for name, count in calls.items()} | decode
    return {
        "bundle": str(folder),
        "schedule": schedule or pipeline.model.default_schedule,
        "graphs": {
            name: {**_summary(times), "calls": count, "load": loads[name]} for name, (times, count) in graphs.items()
        },
        "chain": _summary([t.denoise for t in timings]),
        "glue_share": statistics.median(t.glue / t.denoise for t in timings),
        "peak_anonymous_bytes": memory.anonymous,
        "peak_rss_bytes": memory.resident,
    }


def _summary(times: list[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times)}


def _load_all(pipeline: Pipeline) -> dict[str, float]:
    """Seconds that each graph took to open."""
    loads = {}
    for key in pipeline.bundle.manifest.graphs:
        before = pipeline.timings.load
        pipeline.open(key)
        loads[key.name] = pipeline.timings.load - before
    return loads


def _time_chain(pipeline: Pipeline, schedule: str | None, seed: int) -> Timings:
    shape = (pipeline.model.text_length, pipeline.model.transformer.text_dim)
    text = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    how: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": text, "output_type": "latent"}
    return pipeline(schedule=schedule, seed=seed, **how).timings


def _calls(pipeline: Pipeline, schedule: str | None) -> Counter[str]:
    """How often a run evaluates each stage's graph; those that it does not are left out."""
    steps = plan(pipeline.model.pyramid, pipeline.bundle.manifest.resolution, pipeline.model.schedule(schedule))
    calls: Counter[str] = Counter()
    for step in steps:
        calls[stage_key(step.stage.index, step.expert).name] += step.evaluations
    return +calls


def _time_decode(pipeline: Pipeline) -> dict[str, tuple[list[float], int]]:
    """Seconds of all decoders' graphs over three latent frames of a tile, and how often a video evaluates each."""
    times: dict[str, tuple[list[float], int]] = {}
    for decoder in pipeline.bundle.manifest.decoders.values():
        times |= _time_decoder(pipeline, decoder)
    return times


def _time_decoder(pipeline: Pipeline, decoder: Decoder) -> dict[str, tuple[list[float], int]]:
    channels, frames, *_ = pipeline.bundle.manifest.stages[0].latent
    first, later = (decoder_key(decoder.component, first=first).name for first in (True, False))
    times: dict[str, tuple[list[float], int]] = {first: ([], decoder.tiles.count)}
    if frames > 1:
        times[later] = ([], decoder.tiles.count * (frames - 1))
    start = time.perf_counter()
    latent = np.zeros((channels, min(frames, 3), *decoder.tiles.tile), np.float32)
    for index, _ in enumerate(pipeline.decode_tile(latent, decoder)):
        now = time.perf_counter()
        times[later if index else first][0].append(now - start)
        start = now
    return times
