"""Recording the reference: its inputs, every velocity and every latent, and the frames, in one file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ...runtime.chain.noise import generator, standard_normal
from ...runtime.chain.sampler import Step, sample
from ...runtime.chain.schedules import Schedule
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.video import written_beside
from ...runtime.proof.trace import FORMAT
from ..bundle.parts import text_lengths
from ..families.wan.modules import load_tokenizer
from .reference import Reference

__all__ = ["PROBES", "VAE_FRAMES", "record_trace"]

PROBES = (0.0, 0.5, 0.9)
"""Where in its stage each probe lies: 0 at the noisiest level, 1 at the cleanest."""

PHRASE = "a red circle moving left"
"""Repeated to make prompts of every length."""

VAE_FRAMES = 3
"""Latent frames that the `vae` level decodes in float32: the first, the second, and one whose caches are all its own."""


def record_trace(
    checkpoint: Checkpoint,
    path: Path,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedule: Schedule,
    negative_prompt: str,
    decode: bool = True,
    vae_tile: tuple[int, int] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Record a run per prompt and seed, a few probes of each stage, and the VAE on a few frames.

    Args:
        checkpoint: what to record.
        path: of the trace.
        prompts: one run each per seed. Without a text encoder each is embedded as noise drawn from its position.
        seeds: of the runs.
        schedule: of the runs.
        negative_prompt: for a guided schedule.
        decode: also decode the runs to frames, where the checkpoint has a VAE.
        vae_tile: height and width in latent pixels of the corner that the VAE is recorded on; None: all of the frame.
        advance: called after each evaluation of the reference.

    Raises:
        UsageError: the tile is larger than the frame.
    """
    frame = checkpoint.model.pyramid.stages[0].latent[2:]
    if vae_tile is not None and (vae_tile[0] > frame[0] or vae_tile[1] > frame[1]):
        raise UsageError(f"a tile lies within the frame of {list(frame)} latent pixels, found {list(vae_tile)}")
    reference = Reference(checkpoint)
    model, pyramid = checkpoint.model, checkpoint.model.pyramid
    text = _embeddings(reference, checkpoint, [*prompts, negative_prompt])
    tensors: dict[str, NDArray[Any]] = {"text.negative": text[-1]}
    probes: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    noise = generator(0)
    for stage in pyramid.stages:
        for place in PROBES:
            level = stage.noisy + place * (stage.clean - stage.noisy)
            latent = standard_normal(noise, stage.latent)
            tensors[f"probe.{len(probes)}.latent"] = latent
            tensors[f"probe.{len(probes)}.velocity"] = reference.velocity(stage.index, latent, 1000 * level, text[0])
            probes.append({"stage": stage.index, "level": level})
            advance()
    texts = _texts_of_every_length(checkpoint)
    tensors |= {f"text.probe.{index}": value for index, value in enumerate(reference.encode(texts) if texts else [])}
    decode = decode and bool(checkpoint.vae)
    for seed in seeds:
        for index, prompt in enumerate(prompts):
            name = f"run.{len(runs)}"
            tensors[f"text.{len(runs)}"] = text[index]
            latent = _record_run(tensors, name, reference, checkpoint, text[index], text[-1], schedule, seed, advance)
            if decode:
                tensors[f"{name}.frames"] = reference.decode(latent)
            if not runs and checkpoint.vae:
                height, width = vae_tile or latent.shape[2:]
                tensors["vae.latent"] = np.ascontiguousarray(latent[:, :VAE_FRAMES, :height, :width])
                tensors["vae.frames"] = reference.decode_float(tensors["vae.latent"])
            runs.append({
                "prompt": prompt, "seed": seed, "schedule": schedule.name, "guidance_scale": schedule.guidance_scale,
                "levels": [list(group) for group in schedule.levels], "decoded": decode,
            })  # fmt: skip
    document = {
        "format": FORMAT, "model": model.to_json(), "negative_prompt": negative_prompt, "texts": texts,
        "probes": probes, "runs": runs,
    }  # fmt: skip
    with written_beside(path) as partial:
        arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(arrays, partial, metadata={"trace": json.dumps(document)})


def _texts_of_every_length(checkpoint: Checkpoint) -> list[str]:
    """A prompt for each graph that a bundle has of the text encoder: too long for the shorter ones."""
    if not checkpoint.text_encoder:
        return []
    tokenizer, texts, below = load_tokenizer(checkpoint), [], 0
    for length in text_lengths(checkpoint):
        words = [PHRASE]
        while len(tokenizer(" ".join(words)).input_ids) <= below:
            words.append(PHRASE)
        texts.append(" ".join(words))
        below = length
    return texts


def _embeddings(reference: Reference, checkpoint: Checkpoint, prompts: list[str]) -> NDArray[np.float32]:
    if checkpoint.text_encoder:
        return reference.encode(prompts)
    shape = (checkpoint.model.text_length, checkpoint.config.text_dim)
    return np.stack([standard_normal(generator(index), shape) for index in range(len(prompts))])


def _record_run(
    tensors: dict[str, NDArray[Any]], name: str, reference: Reference, checkpoint: Checkpoint,
    text: NDArray[np.float32], negative: NDArray[np.float32], schedule: Schedule, seed: int, advance: Callable[[], None],
) -> NDArray[np.float32]:  # fmt: skip
    class Recorder:
        """The reference, with the latent of each step kept."""

        latent = np.zeros(0, np.float32)

        def velocity(
            self, stage: int, latent: NDArray[np.float32], timestep: float, text: NDArray[np.float32]
        ) -> NDArray[np.float32]:
            self.latent = latent
            return reference.velocity(stage, latent, timestep, text)

    recorder, steps = Recorder(), 0

    def keep(step: Step) -> None:
        nonlocal steps
        for part, value in (("before", recorder.latent), ("velocity", step.velocity), ("after", step.latent)):
            tensors[f"{name}.step.{steps}.{part}"] = value
        steps += 1
        advance()

    return sample(checkpoint.model.pyramid, recorder, text, schedule, negative_text=negative, seed=seed, callback=keep)
