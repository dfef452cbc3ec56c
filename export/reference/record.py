"""Recording the reference: its inputs, every velocity and every latent, and the frames, in one file."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ...runtime.chain.history import HISTORY
from ...runtime.chain.noise import generator, standard_normal
from ...runtime.chain.plan import StepPlan, plan, single_step
from ...runtime.chain.sampler import Step
from ...runtime.chain.schedules import Schedule
from ...runtime.errors import UsageError
from ...runtime.files import written_beside
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.proof.trace import FORMAT, Probe, Run
from ..bundle.blueprint import text_lengths
from .reference import Reference

__all__ = ["PROBES", "VAE_FRAMES", "record_trace"]

PROBES = (0.0, 0.5, 0.9)
"""Where in its stage each probe lies: 0 at the noisiest level, 1 at the cleanest."""

PHRASE = "a red circle moving left"
"""Words that are repeated to make prompts of every length."""

VAE_FRAMES = 3
"""Latent frames that the `vae` level decodes in float32: the first, the second, and one with all caches its own."""

Tensors = dict[str, NDArray[Any]]
Advance = Callable[[], None]
_Placed = tuple[int, Run]
"""A run, and the position of its prompt."""


def record_trace(
    checkpoint: Checkpoint,
    path: Path,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedule: Schedule,
    negative_prompt: str,
    decode: bool = True,
    decoder: str | None = None,
    vae_tile: tuple[int, int] | None = None,
    chunks: int = 1,
    only: Sequence[int] | None = None,
    parts: bool = True,
    advance: Advance = lambda: None,
) -> None:
    """Record a run per prompt and seed, a few probes of each stage, and the VAE on a few frames.

    Args:
        checkpoint: what to record.
        path: the trace's file.
        prompts: one run each per seed. Without a text encoder each is embedded as noise drawn from its position.
        seeds: the seeds of the runs.
        schedule: the schedule of the runs.
        negative_prompt: what a guided schedule leads away from.
        decode: also decode the runs to frames, where the checkpoint has a decoder.
        decoder: the component that decodes them; None: the checkpoint's first decoder.
        vae_tile: height and width in latent pixels of the corner that the VAE is recorded on; None: all of the frame.
        chunks: how many a run has, of a model that makes videos in chunks.
        only: numbers of the runs to record, seed by seed; None: all.
        parts: also what `parity` alone compares, beside the runs: stages, texts of every length, decoders.
        advance: called after each evaluation of the reference.

    Raises:
        UsageError: the tile is larger than the frame.
    """
    tile = _tile(checkpoint, vae_tile)
    reference, used = Reference(checkpoint), decoder or next(iter(checkpoint.model.decoders), None)
    decoded, words = decode and used is not None, list(enumerate(prompts))
    runs = [(at, Run(prompt, seed, schedule, decoded, chunks)) for seed in seeds for at, prompt in words]
    runs = runs if only is None else [runs[number] for number in only]
    text = reference.embed({at: run.prompt for at, run in runs} | {len(words): negative_prompt})
    tensors, latents = _record_runs(reference, runs, text, used if decoded else None, advance)
    probes, texts = _record_parts(tensors, reference, latents[0], tile, advance) if parts else ([], [])
    _save(path, reference, tensors, probes, runs, negative_prompt=negative_prompt, texts=texts, decoder=used)


def _save(
    path: Path,
    reference: Reference,
    tensors: Tensors,
    probes: Sequence[Probe],
    runs: Sequence[_Placed],
    **described: Any,
) -> None:
    checkpoint = reference.checkpoint
    model = {**checkpoint.model.to_json(), "resolution": str(checkpoint.resolution)}
    listed = {"probes": [probe.to_json() for probe in probes], "runs": [run.to_json() for _, run in runs]}
    document = {"format": FORMAT, "model": model, **described, **listed}
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with written_beside(path) as partial:
        save_file(arrays, partial, metadata={"trace": json.dumps(document)})


def _tile(checkpoint: Checkpoint, asked: tuple[int, int] | None) -> tuple[int, int]:
    _, _, height, width = checkpoint.model.stages(checkpoint.resolution)[0].latent
    if asked is not None and (asked[0] > height or asked[1] > width):
        raise UsageError(f"a tile lies within the frame of {[height, width]} latent pixels, found {list(asked)}")
    return asked or (height, width)


def _record_runs(
    reference: Reference,
    runs: Sequence[_Placed],
    text: Mapping[int, NDArray[np.float32]],
    decoder: str | None,
    advance: Advance,
) -> tuple[Tensors, list[NDArray[np.float32]]]:
    """What is recorded of runs, and the latent of each; the embedding that comes last is the negative prompt's."""
    checkpoint, latents, (*_, negative) = reference.checkpoint, list[NDArray[np.float32]](), text.values()
    tensors: Tensors = {"text.negative": negative}
    for index, (at, run) in enumerate(runs):
        steps = plan(checkpoint.model.pyramid, checkpoint.resolution, run.schedule, run.chunks)
        tensors[f"text.{index}"] = text[at]
        texts = text[at], negative
        latents.append(_record_run(tensors, f"run.{index}", reference, steps, texts, run.seed, advance))
    if decoder is not None:
        tensors |= {f"run.{index}.frames": reference.decode(latent, decoder) for index, latent in enumerate(latents)}
    return tensors, latents


def _record_parts(
    tensors: Tensors, reference: Reference, latent: NDArray[np.float32], tile: tuple[int, int], advance: Advance
) -> tuple[list[Probe], list[str]]:
    """What is compared apart from runs; a decoder is given a run's latent."""
    probes = _record_probes(tensors, reference, tensors["text.0"], advance)
    texts = _record_texts(tensors, reference)
    _record_decoders(tensors, reference, latent, tile)
    return probes, texts


def _record_decoders(
    tensors: Tensors, reference: Reference, latent: NDArray[np.float32], tile: tuple[int, int]
) -> None:
    """Each decoder on a few frames, of a tile where it has some."""
    for component, config in reference.checkpoint.model.decoders.items():
        height, width = tile if config.cut else latent.shape[2:]
        tensors[f"{component}.latent"] = np.ascontiguousarray(latent[:, :VAE_FRAMES, :height, :width])
        tensors[f"{component}.frames"] = reference.decode_float(tensors[f"{component}.latent"], component)


def _record_probes(tensors: Tensors, reference: Reference, text: NDArray[np.float32], advance: Advance) -> list[Probe]:
    model, probes, noise = reference.checkpoint.model, list[Probe](), generator(0)
    conditions, history = {"text": text}, model.family.history
    if history is not None:
        finest = model.stages(reference.checkpoint.resolution)[0].latent
        past = standard_normal(generator(1), (finest[0], history.frames, *finest[2:]))
        conditions[HISTORY] = tensors["probe.history"] = past
    for stage in model.stages(reference.checkpoint.resolution):
        for place in PROBES:
            level = stage.noisy + place * (stage.clean - stage.noisy)
            step, latent = single_step(model.pyramid, stage, level), standard_normal(noise, stage.latent)
            tensors[f"probe.{len(probes)}.latent"] = latent
            tensors[f"probe.{len(probes)}.velocity"] = reference.velocity(step, latent, conditions)
            probes.append(Probe(stage.index, level))
            advance()
    return probes


def _record_texts(tensors: Tensors, reference: Reference) -> list[str]:
    """A prompt for each graph that a bundle has of the text encoder: too long for the shorter ones."""
    checkpoint = reference.checkpoint
    if not checkpoint.text_encoder:
        return []
    texts, below = list[str](), 0
    for length in text_lengths(checkpoint):
        words = [PHRASE]
        while reference.modules.token_count(checkpoint, " ".join(words)) <= below:
            words.append(PHRASE)
        texts.append(" ".join(words))
        below = length
    tensors |= {f"text.probe.{index}": value for index, value in enumerate(reference.encode(texts))}
    return texts


def _record_run(
    tensors: Tensors,
    name: str,
    reference: Reference,
    steps: Sequence[StepPlan],
    texts: tuple[NDArray[np.float32], NDArray[np.float32]],
    seed: int,
    advance: Advance,
) -> NDArray[np.float32]:
    """Sample with the embeddings of a prompt and of the negative one, and keep what each step saw and made."""

    def keep(step: Step) -> None:
        for what, value in (("before", step.before), ("velocity", step.velocity), ("after", step.latent)):
            tensors[f"{name}.step.{step.plan.index}.{what}"] = value
        advance()

    return reference.sample(steps, *texts, seed, keep)
