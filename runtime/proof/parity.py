"""Parity: a bundle against a recorded reference, level by level, in NumPy."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.graphs import Decoder
from ..bundle.manifest import Manifest
from ..chain.history import HISTORY
from ..chain.noise import generator
from ..chain.plan import StepPlan, plan, single_step
from ..chain.sampler import Conditions, Step, guided_velocity, initial_latent, sample, told_of, transition
from ..chain.schedules import explicit_levels
from ..errors import UsageError
from ..model.description import Model
from ..pipeline.chunks import chunk_count
from ..pipeline.decoder import frames_from
from ..pipeline.pipeline import Pipeline
from .metrics import Distance, distance, finite, psnr, same_shape, ssim, worst
from .tolerances import tolerances_of
from .trace import Run, Trace, Watch, unwatched

__all__ = ["check_parity", "check_trace", "free_running", "joined", "probe_conditions"]

Array = NDArray[Any]
Advance = Callable[[str], None]


def check_parity(
    pipeline: Pipeline,
    trace: Trace,
    *,
    ranges: Mapping[str, Any] | None = None,
    advance: Advance = lambda level: None,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Compare a bundle with a trace.

    Args:
        pipeline: an open bundle.
        trace: a trace of the checkpoint that the bundle was built from.
        ranges: how far the intervals that layers round their inputs in are from those of the manifest, where the
            graphs could be read: `{"relative_error", "worst": {"stage", "layer"}}`.
        advance: told the level of each evaluation.
        watch: shown the videos that are compared.

    Returns:
        `{"passed", "resolution", "precision", "levels": {name: {metrics, "tolerance", "passed"}}}`. `chain` holds the
        free-running error, its growth, and the teacher-forced one; a level of a missing component is left out.

    Raises:
        UsageError: the trace is of another model.
    """
    manifest = pipeline.bundle.manifest
    check_trace(trace, manifest)
    _check_parts(trace, manifest)
    levels: dict[str, dict[str, Any]] = {} if ranges is None else {"ranges": dict(ranges)}
    if manifest.text is not None:
        levels["text"] = _text(pipeline, trace, advance)
    levels["stages"] = _stages(pipeline, trace, advance)
    levels["chain"], finals = _chain(pipeline, trace, advance)
    for component, decoder in manifest.decoders.items():
        advance(component)
        levels[component] = _decoded(pipeline, trace, decoder)
    if manifest.decoder is not None and all(run.decoded for run in trace.runs):
        levels["video"] = _video(pipeline, trace, finals, advance, watch)
    _judge(levels, tolerances_of(manifest))
    return {
        "passed": all(level["passed"] for level in levels.values()),
        "resolution": str(manifest.resolution),
        "precision": manifest.scheme("transformer").name,
        "levels": levels,
    }


def _check_model(trace: Trace, manifest: Manifest) -> None:
    """Refuse a trace of another model.

    Raises:
        UsageError: it is; names what differs.
    """
    ours = {**manifest.model.to_json(), "resolution": str(manifest.resolution)}
    if trace.model != ours:
        odd = next(key for key in {**trace.model, **ours} if trace.model.get(key) != ours.get(key))
        raise UsageError(f"{trace.path} was recorded from another model: its '{odd}' differs from the bundle's")


def check_trace(trace: Trace, manifest: Manifest) -> None:
    """Refuse a trace of another model, or one whose runs are not what is to be compared.

    Raises:
        UsageError: it is, or it has no runs, or some at impossible levels.
    """
    _check_model(trace, manifest)
    if not trace.runs:
        raise UsageError(f"{trace.path} holds no run; record it again")
    decodes = manifest.decoder and manifest.decoder.component
    if trace.decoder != decodes and any(run.decoded for run in trace.runs):
        raise UsageError(
            f"{trace.path} holds videos decoded with the {trace.decoder}, and the bundle decodes with {decodes}: "
            "take another --decoder, or record it again"
        )
    for run in trace.runs:
        pyramid, scaled = manifest.model.pyramid, run.schedule.scaled_start
        for levels in (run.schedule.levels, run.schedule.first_chunk or run.schedule.levels):
            if explicit_levels(pyramid, levels, scaled_start=scaled) != levels:
                raise UsageError(f"{trace.path} holds a run at impossible levels; record it again")
        chunk_count(manifest.model, manifest.resolution, run.chunks if run.chunks > 1 else None, None)


def _check_parts(trace: Trace, manifest: Manifest) -> None:
    """Refuse a trace that lacks what is compared apart from runs, or has it of what the model does not have."""
    depth = manifest.model.pyramid.depth
    for probe in trace.probes:
        if probe.stage >= depth or not 0 < probe.level <= 1:
            raise UsageError(
                f"{trace.path} holds a probe of stage {probe.stage} at level {probe.level:g}, "
                "which the model does not have"
            )
    unprobed = set(range(depth)) - {probe.stage for probe in trace.probes}
    if unprobed:
        raise UsageError(f"{trace.path} holds no probe of stage {min(unprobed)}; record it again")
    for component in manifest.decoders:
        if f"{component}.latent" not in trace:
            raise UsageError(f"{trace.path} holds nothing of the {component} that the bundle has; record it again")


def _judge(levels: dict[str, dict[str, Any]], tolerances: dict[str, float]) -> None:
    """Say of each level what it may be, and whether it is."""
    levels["chain"]["teacher_forced"]["tolerance"] = tolerances["teacher_forced"]
    for name, level in levels.items():
        level["tolerance"] = tolerances[name]
        level["passed"] = _passes(name, level, tolerances)


def _passes(name: str, level: dict[str, Any], tolerances: dict[str, float]) -> bool:
    if name == "video":
        return bool(level["psnr"] >= tolerances["video"])
    if name == "ranges":
        return bool(level["relative_error"] <= tolerances["ranges"])
    good = level["relative_l2"] <= tolerances[name]
    if name == "chain":
        good = good and level["teacher_forced"]["relative_l2"] <= tolerances["teacher_forced"]
    return bool(good)


def _by_group(step: StepPlan, found: Array, reference: Array) -> dict[str, Distance]:
    same_shape(found, reference)
    return {group.name: distance(found[:, group.frames], reference[:, group.frames]) for group in step.stage.groups}


def _text(pipeline: Pipeline, trace: Trace, advance: Advance) -> dict[str, Any]:
    pairs = {run.prompt: f"text.{index}" for index, run in enumerate(trace.runs)}
    pairs[trace.negative_prompt] = "text.negative"
    pairs |= {prompt: f"text.probe.{index}" for index, prompt in enumerate(trace.texts)}
    assert pipeline.bundle.manifest.text is not None
    reached = {pipeline.encoder.embed(prompt)[1].shape[1] for prompt in pairs}
    for length in pipeline.bundle.manifest.text.lengths:
        if length not in reached:
            raise UsageError(
                f"{trace.path} holds no prompt of the length that the text encoder's graph for {length} tokens needs; "
                "record it again"
            )
    distances = []
    for prompt, name in pairs.items():
        advance("text")
        distances.append(distance(pipeline.encode(prompt), trace.tensor(name)))
    return worst(distances)


def _stages(pipeline: Pipeline, trace: Trace, advance: Advance) -> dict[str, Any]:
    conditions = probe_conditions(pipeline.model, trace)
    stages, all_distances = pipeline.bundle.manifest.stages, list[Distance]()
    details: list[dict[str, Any]] = []
    for index, probe in enumerate(trace.probes):
        advance("stages")
        step = single_step(pipeline.model.pyramid, stages[probe.stage], probe.level)
        found = pipeline.velocity(step, trace.tensor(f"probe.{index}.latent"), conditions)
        groups = _by_group(step, found, trace.tensor(f"probe.{index}.velocity"))
        all_distances += groups.values()
        measured = {name: d.to_json() for name, d in groups.items()}
        details.append({"stage": probe.stage, "level": probe.level, "groups": measured})
    furthest = max(details, key=lambda d: max(g["relative_l2"] for g in d["groups"].values()))
    return {**worst(all_distances), "worst_stage": furthest["stage"], "probes": details}


def _chain(pipeline: Pipeline, trace: Trace, advance: Advance) -> tuple[dict[str, Any], list[Array]]:
    """The level, and the latent that each run ends with."""
    forced, last = list[Distance](), list[Distance]()
    growth: list[list[float]] = []
    finals: list[Array] = []
    for index, run in enumerate(trace.runs):
        steps = plan(pipeline.model.pyramid, pipeline.bundle.manifest.resolution, run.schedule, run.chunks)
        forced += _teacher_forced(pipeline, trace, index, steps, advance)
        latents = free_running(pipeline, trace, index, steps, advance)
        after = [trace.tensor(f"run.{index}.step.{k}.after") for k in range(len(steps))]
        growth.append([finite(distance(x, y).relative_l2) for x, y in zip(latents, after, strict=True)])
        last += _by_group(steps[-1], latents[-1], after[-1]).values()
        finals.append(joined(steps, latents))
    return {**worst(last), "growth": growth, "teacher_forced": worst(forced)}, finals


def joined(steps: Sequence[StepPlan], latents: Sequence[Array]) -> Array:
    """The latent that a run ends with, of all its chunks, from that after each step."""
    return np.concatenate([x for step, x in zip(steps, latents, strict=True) if step.ends_chunk], axis=1)


def probe_conditions(model: Model, trace: Trace) -> Conditions:
    """What the stages are conditioned on in a trace's probes."""
    history = {} if model.family.history is None else {HISTORY: trace.tensor("probe.history")}
    return {"text": trace.tensor("text.0"), **history}


def _teacher_forced(
    pipeline: Pipeline, trace: Trace, index: int, steps: tuple[StepPlan, ...], advance: Advance
) -> list[Distance]:
    """Each velocity, step and transition from the reference's own latent."""
    given = [{"text": trace.tensor(name)} for name in (f"text.{index}", "text.negative")]
    history, past, distances = pipeline.model.family.history, list[Array](), list[Distance]()
    for chunk, own in groupby(steps, lambda step: step.chunk):
        mine, before = tuple(own), np.concatenate(past, axis=1) if past else None
        conditions, negative = (told_of(text, history, before, mine[0]) for text in given)
        noise = generator(trace.runs[index].seed, chunk)
        initial_latent(mine, noise)  # drawn before the transitions' noise
        solver = steps[0].solver.start()
        for step in mine:
            advance("chain")
            name = f"run.{index}.step.{step.index}"
            x, velocity, after = (trace.tensor(f"{name}.{what}") for what in ("before", "velocity", "after"))
            found = guided_velocity(pipeline, step, x, conditions, negative)
            distances += _by_group(step, found, velocity).values()
            distances += _by_group(step, solver(step, x, velocity, noise), after).values()
            if step.changes_stage:
                begun = transition(pipeline.model.pyramid.taps, step, after, noise)
                finer = steps[step.index + 1]
                distances += _by_group(finer, begun, trace.tensor(f"run.{index}.step.{finer.index}.before")).values()
        past.append(after)
    return distances


def free_running(
    pipeline: Pipeline, trace: Trace, index: int, steps: tuple[StepPlan, ...], advance: Advance
) -> list[Array]:
    """The bundle's own chain from the prompt on: the latent after each step."""
    latents: list[Array] = []

    def keep(step: Step) -> None:
        advance("chain")
        latents.append(step.latent)

    run: Run = trace.runs[index]
    has_text = pipeline.bundle.manifest.text is not None
    text = pipeline.encode(run.prompt) if has_text else trace.tensor(f"text.{index}")
    negative = pipeline.encode(trace.negative_prompt) if has_text else trace.tensor("text.negative")
    sample(
        steps,
        pipeline.model.pyramid.taps,
        pipeline,
        {"text": text},
        negative={"text": negative},
        seed=run.seed,
        callback=keep,
        history=pipeline.model.family.history,
    )
    return latents


def _decoded(pipeline: Pipeline, trace: Trace, decoder: Decoder) -> dict[str, float]:
    """A decoder's graphs alone: on one tile, where frames are decoded in tiles."""
    name, tile = f"{decoder.component}.latent", decoder.tiles.tile
    latent = trace.tensor(name)
    if latent.ndim != 4 or not latent.size:
        raise UsageError(f"{trace.path}: {name}: expected [channels, frames, h, w], found {list(latent.shape)}")
    if latent.shape[2:] != tile:
        size = "x".join(map(str, tile))
        raise UsageError(
            f"{trace.path} was recorded for another decoder: its latent is {list(latent.shape[2:])}, the bundle's tile "
            f"{list(tile)}; record it with --vae-tile {size}"
        )
    frames = np.concatenate(list(pipeline.decode_tile(latent, decoder)))
    return distance(frames, trace.tensor(f"{decoder.component}.frames")).to_json()


def _video(pipeline: Pipeline, trace: Trace, finals: list[Array], advance: Advance, watch: Watch) -> dict[str, Any]:
    peaks, similarities = [], []
    for index, final in enumerate(finals):
        advance("video")
        frames = np.concatenate([frames_from(video) for video in pipeline.decode(final)])
        reference = trace.tensor(f"run.{index}.frames")
        if reference.shape != frames.shape:
            raise UsageError(f"{trace.path}: expected frames {list(frames.shape)}, found {list(reference.shape)}")
        watch(index, 0, frames, reference)
        peaks.append(psnr(frames, reference))
        similarities.append(ssim(frames, reference))
    return {"psnr": min(peaks), "ssim": min(similarities)}
