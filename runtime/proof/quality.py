"""Quality: how much a bundle's rounding changes videos, against recorded runs of the same seeds and noise, in NumPy."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from ..chain.plan import plan
from ..errors import UsageError
from ..pipeline.chunks import frame_count
from ..pipeline.decoder import frames_from, require_finite
from ..pipeline.pipeline import Pipeline
from ..quantisation import COMPONENTS, SCHEMES
from .metrics import distance, finite, psnr, ssim

# What a trace must be, and the chain that runs free from the prompt on, are the same for both proofs.
from .parity import check_trace, free_running, joined
from .trace import Frames, Trace, Watch, unwatched

__all__ = [
    "SUMMARISED",
    "QualityLimits",
    "VideoErrors",
    "check_quality",
    "check_traces",
    "compare_run",
    "compare_videos",
    "judge_runs",
    "limits_of",
    "sharpness",
]

Floats = NDArray[np.float64]
Advance = Callable[[str], None]
WatchRun = Callable[[int, Frames, Frames], None]
"""`Watch`, of one run."""

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Weights of red, green and blue in luma (BT.709)."""

SUMMARISED = ("relative_l2", "cosine", "psnr", "ssim", "motion_error", "difference_error", "sharpness")
"""Figures of a run whose medians are given."""


@dataclass(frozen=True)
class QualityLimits:
    """What the medians of several runs may not leave."""

    min_psnr: float = 30.0
    """Least PSNR of a video, in dB."""
    max_motion_error: float = 0.05
    """Largest relative error of a video's motion."""


def limits_of(*schemes: str) -> QualityLimits:
    """The widest limits that any of some schemes asks for, by their names."""
    stored = [SCHEMES[name] for name in schemes]
    return QualityLimits(min(scheme.min_psnr for scheme in stored), max(scheme.max_motion_error for scheme in stored))


@dataclass(frozen=True)
class VideoErrors:
    """How far a video is from its reference."""

    psnr: float
    """Of all pixels, in dB; 100 for equal videos."""
    ssim: float
    motion: float
    """Mean |x[t+1] - x[t]|, in levels of 8 bits."""
    motion_reference: float
    difference_error: float
    """Relative L2 error of the differences x[t+1] - x[t]."""
    sharpness: float
    """Ratio of the mean sharpness of frames to the reference's."""
    frame_psnr: tuple[float, ...]
    """Of each frame, in dB."""

    @property
    def motion_error(self) -> float:
        """|motion / motion_reference - 1|."""
        return abs(_ratio(self.motion, self.motion_reference) - 1)

    def to_json(self) -> dict[str, Any]:
        """All figures; what is not finite becomes the largest number, so that JSON stays JSON."""
        figures = {name: value for name, value in vars(self).items() if name != "frame_psnr"}
        figures |= {"motion_error": self.motion_error}
        return {name: finite(value) for name, value in figures.items()} | {"frame_psnr": list(self.frame_psnr)}


def sharpness(frame: NDArray[Any]) -> float:
    """Variance of the Laplacian of a frame's luma, for a frame [H, W, 3]: less where it is blurred.

    The Laplacian is x[i-1, j] + x[i+1, j] + x[i, j-1] + x[i, j+1] - 4 x[i, j], inside the border.
    """
    x = frame @ LUMA
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.var())


def compare_videos(found: Iterable[Frames], reference: Frames) -> VideoErrors:
    """Compare a video with its reference, one frame at a time.

    Args:
        found: frames [n, H, W, 3] in pieces, as they are decoded; none is kept longer than the next one needs.
        reference: [T, H, W, 3].

    Returns:
        The distances; a video of one frame has no motion, and no error of it.
    """
    errors = _FrameErrors([], [], [], [], [])
    before: Floats | None = None
    frames = (frame for piece in found for frame in piece)
    for frame, expected in zip(frames, reference, strict=True):
        pair = np.stack([frame, expected]).astype(np.float64)
        errors.rms.append(math.sqrt(((pair[0] - pair[1]) ** 2).mean()))
        errors.ssim.append(ssim(pair[:1], pair[1:]))
        errors.sharpness.append((sharpness(pair[0]), sharpness(pair[1])))
        if before is not None:
            moved = pair - before
            errors.motion.append((float(np.abs(moved[0]).mean()), float(np.abs(moved[1]).mean())))
            errors.squares.append((float(((moved[0] - moved[1]) ** 2).sum()), float((moved[1] ** 2).sum())))
        before = pair
    return errors.summary()


@dataclass(frozen=True)
class _FrameErrors:
    """Figures of each frame, and of each step to the next one; pairs are of what was found and of the reference."""

    rms: list[float]
    ssim: list[float]
    sharpness: list[tuple[float, float]]
    motion: list[tuple[float, float]]
    squares: list[tuple[float, float]]
    """Sums of squares: of the error of a frame difference, and of the reference's frame difference."""

    def summary(self) -> VideoErrors:
        """The figures of the video."""
        motion, motion_reference = np.mean(self.motion or [(0.0, 0.0)], axis=0)
        error, norm = np.sqrt(np.sum(self.squares or [(0.0, 0.0)], axis=0))
        return VideoErrors(
            psnr=_psnr(self.rms),  # of all frames' mean square, not the mean of their PSNR
            ssim=fmean(self.ssim),
            motion=float(motion),
            motion_reference=float(motion_reference),
            difference_error=float(error) if error == 0 else _ratio(error, norm),
            sharpness=_ratio(*np.mean(self.sharpness, axis=0)),
            frame_psnr=tuple(_psnr([rms]) for rms in self.rms),
        )


def _psnr(rms: Sequence[float]) -> float:
    """PSNR of frames of one size, of their root mean square errors."""
    return psnr(np.array(rms), np.zeros(len(rms)))


def _ratio(found: float, reference: float) -> float:
    """found / reference: 1 where both are 0, and infinite where the reference alone is."""
    if reference == 0:
        return 1.0 if found == 0 else math.inf
    return float(found / reference)


def check_traces(pipeline: Pipeline, traces: Sequence[Trace]) -> None:
    """Refuse, before the work, what videos cannot be compared with.

    Raises:
        UsageError: the bundle decodes no video, or a trace is of another model or lacks frames.
    """
    manifest = pipeline.bundle.manifest
    if manifest.decoder is None:
        raise UsageError(
            f"{pipeline.bundle.folder} has no VAE, and quality is judged by videos: "
            "build it from a checkpoint with one, or compare latents with 'pyrexport parity'"
        )
    size, geometry = manifest.resolution, manifest.model.pyramid.geometry
    for trace in traces:
        check_trace(trace, manifest)
        for index, run in enumerate(trace.runs):
            if not run.decoded:
                raise UsageError(f"{trace.path} holds no frames of its run {index}: record it without --no-decode")
            shape = (frame_count(run.chunks, size, geometry), size.height, size.width, 3)
            entry = trace.entries.get(f"run.{index}.frames")
            if entry is not None and (entry.dtype, tuple(entry.shape)) != ("uint8", shape):
                found = f"{entry.dtype} {list(entry.shape)}"
                raise UsageError(f"{trace.path}: frames of run {index}: expected uint8 {list(shape)}, found {found}")


def check_quality(
    pipeline: Pipeline,
    traces: Sequence[Trace],
    limits: QualityLimits,
    *,
    advance: Advance = lambda level: None,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Sample each run of some traces again, from the prompt on, and compare latents and videos.

    Args:
        pipeline: an open bundle.
        traces: of the checkpoint that the bundle was built from, with frames.
        limits: those of the schemes that the bundle is stored in (`limits_of`), or others.
        advance: told `chain` after each step, and `video` after each latent frame that is decoded.
        watch: shown the videos that are compared, in pieces; runs are numbered through all traces.

    Returns:
        `{"passed", "precision", "limits", "median": {...}, "runs": [{"prompt", "seed", "schedule", "chain", ...}]}`.
        `chain` has `stage`, `relative_l2` and `cosine` of the latent after each step, and a run those of the last one;
        for its other figures see `VideoErrors`.

    Raises:
        UsageError: see `check_traces`.
        CheckFailed: latents or frames are not finite.
    """
    check_traces(pipeline, traces)
    places = [(trace, index) for trace in traces for index in range(len(trace.runs))]
    runs = [
        compare_run(pipeline, trace, index, advance, partial(watch, number))
        for number, (trace, index) in enumerate(places)
    ]
    return judge_runs(pipeline.bundle.manifest, runs, limits)


def judge_runs(manifest: Manifest, runs: list[dict[str, Any]], limits: QualityLimits) -> dict[str, Any]:
    """The document of runs that were compared: see `check_quality`."""
    medians = {name: median(run[name] for run in runs) for name in SUMMARISED}
    passed = medians["psnr"] >= limits.min_psnr and medians["motion_error"] <= limits.max_motion_error
    return {
        "passed": passed,
        "resolution": str(manifest.resolution),
        "precision": {component: manifest.scheme(component).name for component in COMPONENTS},
        "limits": vars(limits),
        "median": medians,
        "runs": runs,
    }


def compare_run(pipeline: Pipeline, trace: Trace, index: int, advance: Advance, watch: WatchRun) -> dict[str, Any]:
    """Sample a run of a trace again: how far it is from the recorded one; see `check_quality`."""
    run, reference = trace.runs[index], trace.tensor(f"run.{index}.frames")
    steps = plan(pipeline.model.pyramid, pipeline.bundle.manifest.resolution, run.schedule, run.chunks)
    latents = free_running(pipeline, trace, index, steps, advance)
    final = joined(steps, latents)
    require_finite(final, f"the latents of '{run.prompt}', seed {run.seed},")
    chain = []
    for step, latent in zip(steps, latents, strict=True):
        found = distance(latent, trace.tensor(f"run.{index}.step.{step.index}.after")).to_json()
        chain.append({"stage": step.stage.index, "relative_l2": found["relative_l2"], "cosine": found["cosine"]})
    last = {name: chain[-1][name] for name in ("relative_l2", "cosine")}
    video = compare_videos(_decoded(pipeline, final, reference, advance, watch), reference).to_json()
    return {"prompt": run.prompt, "seed": run.seed, "schedule": run.schedule.name, **last, "chain": chain, **video}


def _decoded(
    pipeline: Pipeline, latent: NDArray[np.float32], reference: Frames, advance: Advance, watch: WatchRun
) -> Iterator[Frames]:
    start = 0
    for piece in pipeline.decode(latent):
        advance("video")
        frames = frames_from(piece)
        watch(start, frames, reference)
        start += len(frames)
        yield frames
