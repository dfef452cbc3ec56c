"""Parity: a bundle against a recorded reference, level by level, in NumPy."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..chain.noise import generator
from ..chain.pyramid import FrameGroup
from ..chain.sampler import Step, euler_step, initial_latent, sample, transition
from ..chain.schedules import Schedule, explicit_levels
from ..errors import UsageError
from ..pipeline.pipeline import Pipeline, frames_from
from .trace import Run, Trace

__all__ = ["TOLERANCES", "Distance", "check_parity", "distance", "psnr", "ssim"]

Array = NDArray[Any]

TOLERANCES: dict[str, dict[str, float]] = {
    # float32 on both sides: only the order of sums differs, 1e-7 an operation; 30 blocks reach 2e-6. A weight that
    # was rounded to bfloat16 in one layer is 1e-4. The chain multiplies an early error by its later steps.
    "fp32": {"text": 1e-5, "stages": 1e-5, "chain": 1e-4, "teacher_forced": 1e-5, "vae": 1e-5, "video": 60.0},
    # Matrices rounded to 11 bits: 2.8e-4 a weight, which sums average over the width of a layer.
    "fp16": {"text": 3e-3, "stages": 3e-3, "chain": 2e-2, "teacher_forced": 3e-3, "vae": 3e-3, "video": 40.0},
    # Matrices rounded to 8 bits: eight times that.
    "bf16": {"text": 2e-2, "stages": 2e-2, "chain": 1e-1, "teacher_forced": 2e-2, "vae": 2e-2, "video": 25.0},
}
"""Largest relative L2 error per level, and for `video` the least PSNR in dB."""

TEXT_TOLERANCES: dict[str, dict[str, float]] = {
    # 128 values share a scale: a step is 1/128 of their largest, 0.6 % a matrix; two dozen layers add up.
    "int8": {"text": 3e-2, "chain": 2e-2, "video": 40.0},
    # 32 values share a scale, a step is 1/8 of their largest: 8 % a matrix. A size format, to be judged by eye.
    "int4": {"text": 3e-1, "chain": 2e-1, "video": 20.0},
}
"""Where the text encoder alone is quantised: the chain runs free from the bundle's own embeddings."""


TILED_VIDEO = 30.0
"""Least PSNR of a video that is decoded in tiles: the decoder's attention sees a tile alone, which no graph can mend."""

HALF_CACHES = {"vae": 3e-3, "video": 40.0}
"""Where the decoder's caches are kept in 11 bits."""


def tolerances_of(manifest: Manifest) -> dict[str, float]:
    """Tolerances of a bundle by level: the widest of what each part's way of storing asks for."""
    asked = [TOLERANCES[manifest.storage]]
    text = manifest.text_storage
    asked.append(TEXT_TOLERANCES.get(text) or {name: TOLERANCES[text][name] for name in ("text", "chain", "video")})
    if manifest.vae is not None:
        asked += [{"video": TILED_VIDEO}] * (manifest.vae.tiles.count > 1)
        asked += [HALF_CACHES] * (manifest.vae.caches == "float16")
    return {
        name: (min if name == "video" else max)(levels[name] for levels in asked if name in levels)
        for name in TOLERANCES[manifest.storage]
    } | {"text": asked[1]["text"]}


@dataclass(frozen=True)
class Distance:
    """How far a result is from its reference."""

    relative_l2: float
    max_abs: float
    cosine: float

    def to_json(self) -> dict[str, float]:
        """As numbers; what is not finite becomes the largest number, so that JSON stays JSON."""
        return {name: _finite(value) for name, value in vars(self).items()}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e30


def distance(found: Array, reference: Array) -> Distance:
    """Distances in float64; a value that is not finite, on either side, counts as infinitely far.

    Raises:
        UsageError: the shapes differ.
    """
    _same_shape(found, reference)
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Distance(math.inf, math.inf, 0.0)
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b))
    relative = error / norm_b if norm_b else (math.inf if error else 0.0)
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return Distance(relative, float(np.abs(a - b).max(initial=0.0)), cosine)


def _same_shape(found: Array, reference: Array) -> None:
    if found.shape != reference.shape:
        raise UsageError(
            f"the trace does not fit: expected a tensor of shape {list(found.shape)}, found {list(reference.shape)}"
        )


def psnr(found: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio of 8-bit frames, in dB; 100 for equal ones."""
    error = float(((found.astype(np.float64) - reference) ** 2).mean())
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))


def ssim(found: Array, reference: Array, window: int = 8) -> float:
    """Mean structural similarity of 8-bit frames [T, H, W, 3], over blocks of 8x8 pixels (Wang et al. 2004)."""
    t, h, w, c = found.shape
    h, w = h - h % window, w - w % window

    def blocks(x: Array) -> Array:
        tiles = x[:, :h, :w].astype(np.float64).reshape(t, h // window, window, w // window, window, c)
        return tiles.transpose(0, 1, 3, 5, 2, 4).reshape(-1, window * window)

    a, b = blocks(found), blocks(reference)
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    covariance = (a * b).mean(-1) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((numerator / ((mean_a**2 + mean_b**2 + c1) * (a.var(-1) + b.var(-1) + c2))).mean())


def check_parity(
    pipeline: Pipeline, trace: Trace, *, advance: Callable[[str], None] = lambda level: None
) -> dict[str, Any]:
    """Compare a bundle with a trace.

    Args:
        pipeline: an open bundle.
        trace: of the checkpoint that it was built from.
        advance: told the level of each evaluation.

    Returns:
        `{"passed", "precision", "levels": {name: {metrics, "tolerance", "passed"}}}`; a level that the bundle has no
        part for is left out. `chain` holds the free-running error, its growth, and the teacher-forced one.

    Raises:
        UsageError: the trace is of another model.
    """
    model = pipeline.model
    if trace.model != model.to_json():
        odd = next(
            key for key in {**trace.model, **model.to_json()} if trace.model.get(key) != model.to_json().get(key)
        )
        raise UsageError(f"{trace.path} was recorded from another model: its '{odd}' differs from the bundle's")
    manifest = pipeline.bundle.manifest
    _check_trace(trace, manifest)
    tolerances = tolerances_of(manifest)
    levels: dict[str, dict[str, Any]] = {}
    if manifest.text is not None:
        levels["text"] = _text(pipeline, trace, advance)
    levels["stages"] = _stages(pipeline, trace, advance)
    levels["chain"] = _chain(pipeline, trace, advance)
    if manifest.vae is not None:
        advance("vae")
        levels["vae"] = _vae(pipeline, trace, manifest.vae.tiles.tile)
        finals = levels["chain"].pop("finals")
        if all(run.decoded for run in trace.runs):
            levels["video"] = _video(pipeline, trace, finals, advance)
    levels["chain"].pop("finals", None)
    for name, level in levels.items():
        level["tolerance"] = tolerances[name]
        level["passed"] = _passes(name, level, tolerances)
    return {
        "passed": all(level["passed"] for level in levels.values()),
        "precision": manifest.storage,
        "levels": levels,
    }


def _check_trace(trace: Trace, manifest: Manifest) -> None:
    model = manifest.model
    if not trace.runs or not trace.probes:
        raise UsageError(f"{trace.path} holds no run or no probe; record it again")
    for probe in trace.probes:
        if probe.stage >= model.pyramid.depth or not 0 < probe.level <= 1:
            raise UsageError(
                f"{trace.path} holds a probe of stage {probe.stage} at level {probe.level:g}, which the model does not have"
            )
    unprobed = set(range(model.pyramid.depth)) - {probe.stage for probe in trace.probes}
    if unprobed:
        raise UsageError(f"{trace.path} holds no probe of stage {min(unprobed)}; record it again")
    if manifest.vae is not None and "vae.latent" not in trace:
        raise UsageError(f"{trace.path} holds nothing of the VAE that the bundle has; record it again")
    for run in trace.runs:
        levels = explicit_levels(model.pyramid, run.levels)
        if [list(group) for group in levels] != run.levels:
            raise UsageError(f"{trace.path} holds a run at impossible levels; record it again")


def _passes(name: str, level: dict[str, Any], tolerances: dict[str, float]) -> bool:
    if name == "video":
        return bool(level["psnr"] >= tolerances["video"])
    good = level["relative_l2"] <= tolerances[name]
    if name == "chain":
        good = good and level["teacher_forced"]["relative_l2"] <= tolerances["teacher_forced"]
    return bool(good)


def _worst(distances: list[Distance]) -> dict[str, float]:
    return {
        "relative_l2": _finite(max(d.relative_l2 for d in distances)),
        "max_abs": _finite(max(d.max_abs for d in distances)),
        "cosine": min(d.cosine for d in distances),
    }


def _by_group(pipeline: Pipeline, found: Array, reference: Array) -> dict[str, Distance]:
    groups: tuple[FrameGroup, ...] = pipeline.model.pyramid.groups
    _same_shape(found, reference)
    return {group.name: distance(found[:, group.frames], reference[:, group.frames]) for group in groups}


def _text(pipeline: Pipeline, trace: Trace, advance: Callable[[str], None]) -> dict[str, Any]:
    pairs = {run.prompt: f"text.{index}" for index, run in enumerate(trace.runs)}
    pairs[trace.negative_prompt] = "text.negative"
    pairs |= {prompt: f"text.probe.{index}" for index, prompt in enumerate(trace.texts)}
    assert pipeline.bundle.manifest.text is not None
    reached = {pipeline.embed(prompt)[1].shape[1] for prompt in pairs}
    for length in pipeline.bundle.manifest.text.lengths:
        if length not in reached:
            raise UsageError(
                f"{trace.path} holds no prompt of the length that graph text_{length} is for; record it again"
            )
    distances = []
    for prompt, name in pairs.items():
        advance("text")
        distances.append(distance(pipeline.encode(prompt), trace.tensor(name)))
    return _worst(distances)


def _stages(pipeline: Pipeline, trace: Trace, advance: Callable[[str], None]) -> dict[str, Any]:
    text = trace.tensor("text.0")
    all_distances: list[Distance] = []
    details: list[dict[str, Any]] = []
    for index, probe in enumerate(trace.probes):
        advance("stages")
        found = pipeline.velocity(probe.stage, trace.tensor(f"probe.{index}.latent"), 1000 * probe.level, text)
        groups = _by_group(pipeline, found, trace.tensor(f"probe.{index}.velocity"))
        all_distances += list(groups.values())
        details.append({
            "stage": probe.stage, "level": probe.level, "groups": {name: d.to_json() for name, d in groups.items()},
        })  # fmt: skip
    worst = max(details, key=lambda d: max(g["relative_l2"] for g in d["groups"].values()))
    return {**_worst(all_distances), "worst_stage": worst["stage"], "probes": details}


def _chain(pipeline: Pipeline, trace: Trace, advance: Callable[[str], None]) -> dict[str, Any]:
    forced: list[Distance] = []
    growth: list[list[float]] = []
    finals, last = [], []
    for index, run in enumerate(trace.runs):
        forced += _teacher_forced(pipeline, trace, index, run, advance)
        latents, final = _free_running(pipeline, trace, index, run, advance)
        steps = [distance(x, trace.tensor(f"run.{index}.step.{k}.after")) for k, x in enumerate(latents)]
        growth.append([_finite(d.relative_l2) for d in steps])
        finals.append(final)
        last += list(_by_group(pipeline, final, trace.tensor(f"run.{index}.step.{len(latents) - 1}.after")).values())
    return {**_worst(last), "growth": growth, "teacher_forced": _worst(forced), "finals": finals}


def _schedule(run: Run) -> Schedule:
    return Schedule(run.schedule, tuple(map(tuple, run.levels)), run.guidance_scale)


def _steps(pipeline: Pipeline, schedule: Schedule) -> Iterator[tuple[int, float, float, bool]]:
    """Stage, level, next level, and whether the stage ends there."""
    for stage, levels in zip(reversed(pipeline.model.pyramid.stages), schedule.levels, strict=True):
        for k, (level, after) in enumerate(zip(levels, (*levels[1:], stage.clean), strict=True)):
            yield stage.index, level, after, k + 1 == len(levels)


def _teacher_forced(
    pipeline: Pipeline, trace: Trace, index: int, run: Run, advance: Callable[[str], None]
) -> list[Distance]:
    """Each velocity, step and transition from the reference's own latent."""
    pyramid, schedule = pipeline.model.pyramid, _schedule(run)
    text, negative = trace.tensor(f"text.{index}"), trace.tensor("text.negative")
    noise = generator(run.seed)
    initial_latent(pyramid, noise)  # drawn before the transitions' noise
    distances: list[Distance] = []
    steps = list(_steps(pipeline, schedule))
    for k, (stage, level, after, ends) in enumerate(steps):
        advance("chain")
        name = f"run.{index}.step.{k}"
        x = trace.tensor(f"{name}.before")
        v = pipeline.velocity(stage, x, 1000 * level, text)
        if schedule.guided:
            unconditional = pipeline.velocity(stage, x, 1000 * level, negative)
            v = unconditional + np.float32(schedule.guidance_scale) * (v - unconditional)
        reference_v, reference_x = trace.tensor(f"{name}.velocity"), trace.tensor(f"{name}.after")
        distances += _by_group(pipeline, v, reference_v).values()
        stepped = euler_step(pyramid, stage, x, reference_v, level, after)
        distances += _by_group(pipeline, stepped, reference_x).values()
        if ends and k + 1 < len(steps):
            begun = transition(pyramid, stage, reference_x, noise)
            distances += _by_group(pipeline, begun, trace.tensor(f"run.{index}.step.{k + 1}.before")).values()
    return distances


def _free_running(
    pipeline: Pipeline, trace: Trace, index: int, run: Run, advance: Callable[[str], None]
) -> tuple[list[Array], Array]:
    """The bundle's own chain from the prompt on: the latent after each step."""
    latents: list[Array] = []

    def keep(step: Step) -> None:
        advance("chain")
        latents.append(step.latent)

    has_text = pipeline.bundle.manifest.text is not None
    text = pipeline.encode(run.prompt) if has_text else trace.tensor(f"text.{index}")
    negative = pipeline.encode(trace.negative_prompt) if has_text else trace.tensor("text.negative")
    final = sample(
        pipeline.model.pyramid, pipeline, text, _schedule(run), negative_text=negative, seed=run.seed, callback=keep
    )
    return latents, final


def _vae(pipeline: Pipeline, trace: Trace, tile: tuple[int, int]) -> dict[str, float]:
    """The decoder's graphs alone: on one tile, where frames are decoded in tiles."""
    latent = trace.tensor("vae.latent")
    if latent.ndim != 4 or not latent.size:
        raise UsageError(f"{trace.path}: vae.latent: expected [channels, frames, h, w], found {list(latent.shape)}")
    if latent.shape[2:] != tile:
        size = "x".join(map(str, tile))
        raise UsageError(
            f"{trace.path} was recorded for another decoder: its latent is {list(latent.shape[2:])}, the bundle's tile "
            f"{list(tile)}; record it with --vae-tile {size}"
        )
    return distance(np.concatenate(list(pipeline.decode_tile(latent))), trace.tensor("vae.frames")).to_json()


def _video(pipeline: Pipeline, trace: Trace, finals: list[Array], advance: Callable[[str], None]) -> dict[str, Any]:
    peaks, similarities = [], []
    for index, final in enumerate(finals):
        advance("video")
        frames = np.concatenate([frames_from(video) for video in pipeline.decode(final)])
        reference = trace.tensor(f"run.{index}.frames")
        if reference.shape != frames.shape:
            raise UsageError(f"{trace.path}: expected frames {list(frames.shape)}, found {list(reference.shape)}")
        peaks.append(psnr(frames, reference))
        similarities.append(ssim(frames, reference))
    return {"psnr": min(peaks), "ssim": min(similarities)}
