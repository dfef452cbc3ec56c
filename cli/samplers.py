"""What does the jobs of `sample`: a bundle's pipeline, or a checkpoint's PyTorch reference."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.opening import is_bundle
from ..runtime.chain.plan import plan
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.sampler import Step, sample
from ..runtime.chain.schedules import Schedule
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.description import Model
from ..runtime.pipeline.decoder import require_finite
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.pipeline.video import open_frames, save_array
from .common import resolve_checkpoint
from .jobs import Job, write_extras

__all__ = ["Sampler", "open_sampler"]

Frames = NDArray[np.uint8]
Callback = Callable[[Step], None]


class Sampler(Protocol):
    """A model that can be sampled."""

    model: Model
    resolution: Resolution
    has_text_encoder: bool
    has_vae: bool
    weights: str | None
    """A hash of a bundle's files."""

    def run(self, job: Job, schedule: Schedule, negative: str, seed: int, callback: Callback) -> None:
        """Sample a job's prompt and write its files."""
        ...


@contextmanager
def open_sampler(
    model: Path, resolution: Resolution | None, engine: EngineOptions, *, resident: bool
) -> Iterator[Sampler]:
    """The sampler of a bundle or of a checkpoint.

    Raises:
        UsageError: an option is for the other one.
    """
    if is_bundle(model):
        if resolution is not None:
            raise UsageError(f"{model} is a bundle, whose resolution is fixed: build one at {resolution}")
        with load(model, resident=resident, threads=engine.threads, **engine.own) as pipeline:
            yield BundleSampler(pipeline)
        return
    if engine.own or resident:
        given = [f"--{name.replace('_', '-')}" for name in engine.own] + (["--resident"] if resident else [])
        raise UsageError(f"{model} is a checkpoint, which PyTorch runs: leave out {', '.join(given)} (for bundles)")
    yield ReferenceSampler(resolve_checkpoint(model, resolution), engine.threads)


class BundleSampler:
    """A bundle's pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        manifest = pipeline.bundle.manifest
        self.pipeline, self.model, self.resolution = pipeline, pipeline.model, manifest.resolution
        self.has_text_encoder, self.has_vae = manifest.text is not None, manifest.decoder is not None
        hashes = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()))
        self.weights: str | None = hashlib.sha256(hashes.encode()).hexdigest()

    def run(self, job: Job, schedule: Schedule, negative: str, seed: int, callback: Callback) -> None:
        common: dict[str, Any] = {
            "negative_prompt": negative,
            "levels": [list(group) for group in schedule.levels],
            "guidance_scale": schedule.guidance_scale,
            "seed": seed,
            "callback": callback,
        }
        if job.latent_only:
            save_array(job.output, self.pipeline(job.prompt, output_type="latent", **common).latents)
            return
        picked: list[Frames] = []
        with open_frames(job.output) as write:

            def take(frames: Frames) -> None:
                write(frames)
                if job.sheet is not None:
                    picked.append(frames)

            latents = self.pipeline(job.prompt, on_frames=take, **common).latents
        write_extras(job, latents, picked)


class ReferenceSampler:
    """A checkpoint's PyTorch reference, loaded when the first job is done."""

    weights: str | None = None

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        self.checkpoint, self.threads = checkpoint, threads
        self.model, self.resolution = checkpoint.model, checkpoint.resolution
        self.has_text_encoder, self.has_vae = bool(checkpoint.text_encoder), bool(checkpoint.vae)
        self._reference: Any = None

    def run(self, job: Job, schedule: Schedule, negative: str, seed: int, callback: Callback) -> None:
        if self._reference is None:
            self._reference = self._load()
        reference, pyramid = self._reference, self.model.pyramid
        text = reference.encode([job.prompt, negative] if schedule.guided else [job.prompt])
        conditions, unconditional = {"text": text[0]}, {"text": text[-1]}
        steps = plan(pyramid, self.resolution, schedule)
        latent = sample(
            steps, pyramid.taps, reference, conditions, negative=unconditional, seed=seed, callback=callback
        )
        require_finite(latent, "the latents of this run")
        if job.latent_only:
            save_array(job.output, latent)
            return
        frames = reference.decode(latent)
        with open_frames(job.output) as write:
            write(frames)
        write_extras(job, latent, [frames])

    def _load(self) -> Any:
        import torch

        from ..export.reference.reference import Reference

        if self.threads:
            torch.set_num_threads(self.threads)
        return Reference(self.checkpoint)
