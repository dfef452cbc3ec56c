"""Diffusers' own `HeliosPyramidPipeline`, unmodified, with the scheduler of the checkpoint's folder: the oracle."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import HeliosPyramidPipeline
from numpy.typing import NDArray
from torch import nn

from ....runtime.chain.noise import generator
from ....runtime.chain.plan import StepPlan
from ....runtime.chain.pyramid import Resolution
from ....runtime.chain.resample import draw_high_bands
from ....runtime.chain.sampler import Step, initial_latent
from ....runtime.chain.wavelets import synthesise
from ....runtime.documents import read_json
from ....runtime.errors import UsageError
from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.description import FORMAT, Model, parse_model
from ....runtime.model.families.helios import HELIOS
from ....runtime.model.scheduler import scheduler_class

__all__ = ["OurNoise", "follows_pipeline", "run_pipeline"]

Latent = NDArray[np.float32]


def follows_pipeline(checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
    """Whether a run is one that the checkpoint's own pipeline makes: pyramid, solver, guidance, and scheduler's ρ."""
    own, first = _own_model(checkpoint), steps[0]
    if own is None or own.pyramid != checkpoint.model.pyramid or _counts(steps) is None:
        return False
    schedule = own.schedule()
    if (schedule.solver, schedule.guidance) != (first.solver, first.guidance):
        return False
    scheduler, depth = _scheduler(checkpoint), checkpoint.model.pyramid.depth
    stages = checkpoint.model.stages(checkpoint.resolution)
    for (_, index), taken in groupby(steps, lambda step: (step.chunk, step.stage.index)):
        rho = [step.sigmas[0][0] for step in taken]
        before = stages[min(index + 1, depth - 1)]  # the pipeline counts tokens before it goes to the next scale
        scheduler.set_timesteps(len(rho), depth - 1 - index, mu=_mu(scheduler, before.tokens))
        if not np.allclose(scheduler.sigmas[:-1].numpy(), rho, atol=1e-9):
            return False
    return True


def _own_model(checkpoint: Checkpoint) -> Model | None:
    """What the scheduler says, whatever `pyramid.json` does; None: there is none, or none that is supported."""
    folder = checkpoint.folder
    try:
        document = {"format": FORMAT, **HELIOS.described(folder)}
        return parse_model(document, HELIOS, checkpoint.model.transformer, str(folder))
    except UsageError:  # a folder whose `pyramid.json` says everything needs none
        return None


def _mu(scheduler: Any, tokens: int) -> float:
    get = scheduler.config.get
    few, many = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    least, most = get("base_shift", 0.5), get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - few) / (many - few))


def _counts(steps: Sequence[StepPlan]) -> tuple[list[int], bool] | None:
    """Steps of each stage, coarsest first, and whether the first chunk has twice as many; None: neither so."""
    counts: dict[int, list[int]] = {}
    for (chunk, _), taken in groupby(steps, lambda step: (step.chunk, step.stage.index)):
        counts.setdefault(chunk, []).append(len(list(taken)))
    first, *others = counts.values()
    if any(own != others[0] for own in others):
        return None
    if not others or first == others[0]:
        return first, False
    return (others[0], True) if first == [2 * n for n in others[0]] else None


class OurNoise:
    """The runtime's noise as the pipeline takes it: what `prepare_latents` and `sample_block_noise` return."""

    def __init__(self, steps: Sequence[StepPlan], seed: int, taps: Any) -> None:
        """Of a run of a pyramid whose wavelet has these low-pass taps."""
        self.chunks = [list(own) for _, own in groupby(steps, lambda step: step.chunk)]
        self.seed, self.taps, self.chunk = seed, taps, 0
        self.generator = generator(seed)

    def prepare_latents(self, *sizes: Any, **how: Any) -> torch.Tensor:
        """The next chunk's noise in the finest stage's size, which the pipeline halves and doubles twice."""
        self.generator = generator(self.seed, self.chunk)
        steps = self.chunks[self.chunk]
        self.chunk += 1
        times = 2 ** steps[0].stage.index
        latent = initial_latent(steps, self.generator)
        return torch.from_numpy(latent.repeat(times, 2).repeat(times, 3) / np.float32(times))[None]

    def sample_block_noise(
        self, batch: int, channels: int, frames: int, height: int, width: int, *rest: Any
    ) -> torch.Tensor:
        """Noise of variance 1 in blocks of two by two that add up to 0: the high bands alone, 3/4 of all variance."""
        shape = (channels, frames, height // 2, width // 2)
        bands = {"00": np.zeros(shape, np.float32), **draw_high_bands(self.generator, shape, 2)}
        return torch.from_numpy(synthesise(bands, self.taps, (2, 3)) * np.float32(2 / math.sqrt(3)))[None]


class _NoDecoder(nn.Module):
    """In the place of a VAE: the pipeline decodes whether frames are asked for or not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.config = SimpleNamespace(
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scale_factor_temporal=HELIOS.compression.temporal,
            scale_factor_spatial=HELIOS.compression.spatial,
        )

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (latents[:, :1, :, :1, :1],)


def run_pipeline(
    checkpoint: Checkpoint,
    transformer: Any,
    steps: Sequence[StepPlan],
    seed: int,
    text: Latent,
    negative: Latent,
    keep: Callable[[Step], None],
) -> Latent:
    """Sample with diffusers' `HeliosPyramidPipeline`.

    Args:
        checkpoint: whose scheduler is taken from its folder.
        transformer: diffusers' module.
        steps: of the run; see `follows_pipeline`.
        seed: of all noise, which is the runtime's.
        text: embeddings of the prompt [text length, text width].
        negative: those of the negative prompt, used where steps are guided.
        keep: called after each step.

    Returns:
        The latent of all chunks [C, T, H, W].
    """
    scheduler, noise = _scheduler(checkpoint), OurNoise(steps, seed, checkpoint.model.pyramid.taps)
    pipeline = _pipeline(checkpoint, transformer, scheduler)
    pipeline.prepare_latents, pipeline.sample_block_noise = noise.prepare_latents, noise.sample_block_noise
    take, left = scheduler.step, iter(steps)

    def taken(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        after: tuple[torch.Tensor, ...] = take(velocity, timestep, sample, **options)
        keep(Step(next(left), *(tensor[0].float().numpy().copy() for tensor in (velocity, after[0], sample))))
        return after

    scheduler.step = taken
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    given = {name: torch.from_numpy(values)[None] for name, values in embeds.items()}
    latents: torch.Tensor = pipeline(**given, **_request(checkpoint.resolution, steps)).frames
    return latents[0].numpy()


def _scheduler(checkpoint: Checkpoint) -> Any:
    kind: Any = getattr(diffusers, scheduler_class(checkpoint.folder) or "")
    return kind.from_pretrained(str(checkpoint.folder / "scheduler"))


def _pipeline(checkpoint: Checkpoint, transformer: Any, scheduler: Any) -> Any:
    index = read_json(checkpoint.folder / "model_index.json")
    how = {name: bool(index.get(name)) for name in ("is_cfg_zero_star", "is_distilled")}
    decoder = _NoDecoder(checkpoint.model.pyramid.geometry.channels)
    pipeline = HeliosPyramidPipeline(None, None, decoder, scheduler, transformer, **how)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _request(resolution: Resolution, steps: Sequence[StepPlan]) -> dict[str, Any]:
    """A pipeline's arguments for latents of a resolution, by steps that it takes."""
    counts = _counts(steps)
    assert counts is not None
    size = {"height": resolution.height, "width": resolution.width}
    chunks = {
        "num_frames": resolution.frames * (steps[-1].chunk + 1),
        "num_latent_frames_per_chunk": steps[-1].stage.latent[1],
        "pyramid_num_inference_steps_list": counts[0],
        "is_amplify_first_chunk": counts[1],
    }
    return {**size, **chunks, "guidance_scale": steps[0].guidance_scale, "output_type": "latent"}
