"""The graphs that a bundle is made of, and the facts about a checkpoint that go with them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..runtime.checkpoint import Checkpoint
from ..runtime.manifest import cache_names
from .layers import QUANTISED, Source, WeightSpace
from .modules import empty_modules
from .stage_graph import StageGraph
from .text_graph import TextGraph
from .vae_graph import VaeGraph
from .weights import FILE_DTYPES

__all__ = [
    "TEXT_LENGTHS",
    "Part",
    "graph_parts",
    "latent_statistics",
    "table_source",
    "text_lengths",
    "timestep_frequencies",
]

TEXT_LENGTHS = (64, 128, 256)
"""Static lengths of the text encoder below the model's own; a prompt takes the shortest that holds it."""


@dataclass(frozen=True)
class Part:
    """A graph to be made."""

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]


def graph_parts(checkpoint: Checkpoint, storage: str, text_storage: str) -> Iterator[Part]:
    """Every graph of a checkpoint's bundle, matrices stored as `storage`, the text encoder's as `text_storage`."""
    model, config = checkpoint.model, checkpoint.config
    for stage in model.pyramid.stages:
        inputs = {
            "latent": (1, *stage.latent),
            "timestep_features": (1, config.freq_dim),
            "text": (1, model.text_length, config.text_dim),
        }
        yield Part(f"stage{stage.index}", StageGraph(checkpoint, stage, storage), inputs, ("velocity",))
    if checkpoint.text_encoder:
        for length in text_lengths(checkpoint):
            inputs = {"embeddings": (1, length, config.text_dim), "mask": (1, length)}
            yield Part(f"text_{length}", TextGraph(checkpoint, length, text_storage), inputs, ("text",))
    if checkpoint.vae:
        yield from _vae_parts(checkpoint, storage)


def _vae_parts(checkpoint: Checkpoint, storage: str) -> Iterator[Part]:
    channels, _, height, width = checkpoint.model.pyramid.stages[0].latent
    latent = {"latent": (1, channels, height, width)}
    first = VaeGraph(checkpoint, storage, first=True)
    shapes = first.cache_shapes(height, width)
    outputs = ("frames", *cache_names(len(shapes), new=True))
    yield Part("vae_first", first, latent, outputs)
    caches = dict(zip(cache_names(len(shapes)), shapes, strict=True))
    yield Part("vae_next", VaeGraph(checkpoint, storage, first=False), latent | caches, outputs)


def text_lengths(checkpoint: Checkpoint) -> list[int]:
    """Static lengths of the text encoder, increasing; the last is the model's text length."""
    longest = checkpoint.model.text_length
    return [length for length in TEXT_LENGTHS if length < longest] + [longest]


def table_source(checkpoint: Checkpoint, storage: str) -> Source | None:
    """The embedding table, which no graph holds; as it is in the checkpoint where matrices are quantised."""
    if not checkpoint.text_encoder:
        return None
    if storage in QUANTISED:
        storage = str(FILE_DTYPES[checkpoint.text_encoder["shared.weight"].dtype]).removeprefix("torch.")
    space = WeightSpace("text_encoder", checkpoint.text_encoder, storage)
    source: Source = space.kernel("shared.weight").source  # type: ignore[attr-defined]
    return source


def timestep_frequencies(width: int) -> list[float]:
    """Frequencies of the timestep features, by diffusers' formula in PyTorch's float32."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(0, half, dtype=torch.float32) / half
    return [float(value) for value in torch.exp(exponent)]


def latent_statistics(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents per channel, from the VAE's configuration or diffusers' defaults."""
    channels = checkpoint.config.in_channels
    if checkpoint.vae_config is None:
        return [0.0] * channels, [1.0] * channels
    config = empty_modules(checkpoint)["vae"].config
    return [float(v) for v in config.latents_mean], [float(v) for v in config.latents_std]  # type: ignore[union-attr]
