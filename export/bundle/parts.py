"""The graphs that a bundle is made of, and the facts about a checkpoint that go with them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...runtime.bundle.manifest import PACKED, PRECISIONS, TEXT_PRECISIONS, cache_names
from ...runtime.bundle.tiles import TilePlan
from ...runtime.model.checkpoint import Checkpoint
from ...targets.forms import TensorSpec
from ..families.dialects import FUSED, Dialect
from ..families.layers import QUANTISED, Source, WeightSpace
from ..families.wan.modules import empty_modules
from ..families.wan.text import TextGraph
from ..families.wan.transformer import StageGraph
from ..families.wan.vae import PackedVae, VaeGraph
from ..weights.stream import FILE_DTYPES

__all__ = [
    "TEXT_LENGTHS",
    "Options",
    "Part",
    "choose_tile",
    "graph_parts",
    "latent_statistics",
    "table_source",
    "text_lengths",
    "tile_plan",
    "timestep_frequencies",
]

TEXT_LENGTHS = (64, 128, 256)
"""Static lengths of the text encoder below the model's own; a prompt takes the shortest that holds it."""


VAE_BUDGET = 3 * 2**30
"""Memory that decoding may take before frames are cut into tiles, in bytes."""

ACTIVATIONS = 1.3
"""Most that a decoder's step holds beside its old and new caches, by the bytes of its caches in float32."""

LEAST_CHOSEN = 16
"""Height and width of the smallest tile that is chosen: it overlaps its neighbours by 4 latent pixels, 32 of the video."""


@dataclass(frozen=True)
class Part:
    """A graph to be made."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    symbols: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    """`torch.export.Dim` of the axes in which graphs of the same module differ, by input."""
    layers: Sequence[nn.Module] = ()
    """Of the module, that are alike."""


@dataclass(frozen=True)
class Options:
    """How a checkpoint's graphs are stored and cut."""

    precision: str = "fp32"
    """Of the stored matrices: "fp32", "fp16" or "bf16"."""
    text_precision: str = "fp32"
    """Of the text encoder's; also "int8" or "int4"."""
    vae_tile: tuple[int, int] | None = None
    """Height and width in latent pixels; None: frames are decoded whole."""
    vae_caches: str = "float32"
    """Or "float16"."""
    layout: str = ""
    """Of a target that keeps profiles: "shared", one file for all stages, or "per-stage"."""
    compute_capabilities: tuple[str, ...] = ()
    """Of the GPUs that are built for, where the target asks for them."""

    @property
    def storage(self) -> str:
        """Dtype of the stored matrices."""
        return PRECISIONS[self.precision]

    @property
    def text_storage(self) -> str:
        """Dtype of the text encoder's, or the name of its quantisation."""
        return TEXT_PRECISIONS[self.text_precision]


def graph_parts(
    checkpoint: Checkpoint, options: Options, dialect: Dialect = FUSED, *, symbolic: bool = False
) -> Iterator[Part]:
    """Every graph of a checkpoint's bundle; where `symbolic`, those that differ in their shapes alone have one module."""
    yield from _stage_parts(checkpoint, options, dialect, symbolic and options.layout != "per-stage")
    if checkpoint.text_encoder:
        yield from _text_parts(checkpoint, options, dialect, symbolic)
    if checkpoint.vae:
        yield from _vae_parts(checkpoint, options, dialect)


def _stage_parts(checkpoint: Checkpoint, options: Options, dialect: Dialect, symbolic: bool) -> Iterator[Part]:
    model, config, stages = checkpoint.model, checkpoint.config, checkpoint.model.pyramid.stages
    alike = symbolic and model.pyramid.kind != "ppf"  # PPF's stages have layers of their own
    one = StageGraph(checkpoint, stages[0], options.storage, dialect) if alike else None
    patches = [1, 1, *stages[0].patch_size]
    symbols = _symbols("latent", [(1, *stage.latent) for stage in stages], patches) if alike else {}
    for stage in stages:
        inputs = (
            TensorSpec("latent", (1, *stage.latent)),
            TensorSpec("timestep_features", (1, config.freq_dim)),
            TensorSpec("text", (1, model.text_length, config.text_dim)),
        )
        module = one or StageGraph(checkpoint, stage, options.storage, dialect)
        yield Part(f"stage{stage.index}", module, inputs, ("velocity",), symbols, tuple(module.blocks))


def _text_parts(checkpoint: Checkpoint, options: Options, dialect: Dialect, symbolic: bool) -> Iterator[Part]:
    lengths, width = text_lengths(checkpoint), checkpoint.config.text_dim
    one = TextGraph(checkpoint, lengths[-1], options.text_storage, dialect) if symbolic else None
    symbols: dict[str, Mapping[int, Any]] = {}
    if symbolic and len(lengths) > 1:
        length = torch.export.Dim("L", min=lengths[0], max=lengths[-1])
        symbols = {"embeddings": {1: length}, "mask": {1: length}}
    for count in lengths:
        encoder = one or TextGraph(checkpoint, count, options.text_storage, dialect)
        specs = TensorSpec("embeddings", (1, count, width)), TensorSpec("mask", (1, count))
        yield Part(f"text_{count}", encoder, specs, ("text",), symbols)


def _symbols(name: str, shapes: Sequence[tuple[int, ...]], steps: Sequence[int]) -> dict[str, Mapping[int, Any]]:
    """A symbol for each axis in which shapes differ, a multiple of the axis's step."""
    axes = {}
    for axis, step in enumerate(steps):
        counts = {shape[axis] // step for shape in shapes}
        if len(counts) > 1:
            count: Any = torch.export.Dim(f"{name}_{axis}", min=min(counts), max=max(counts))
            axes[axis] = count if step == 1 else step * count
    return {name: axes} if axes else {}


def _vae_parts(checkpoint: Checkpoint, options: Options, dialect: Dialect) -> Iterator[Part]:
    channels = checkpoint.config.in_channels
    height, width = tile_plan(checkpoint, options).tile
    latent = TensorSpec("latent", (1, channels, height, width))
    shapes = VaeGraph(checkpoint, options.storage, options.vae_caches, first=True).cache_shapes(height, width)

    def decoder(first: bool) -> nn.Module:
        vae = VaeGraph(checkpoint, options.storage, options.vae_caches, first=first, dialect=dialect)
        return PackedVae(vae, shapes) if dialect.packed else vae

    first, later = decoder(True), decoder(False)
    given = [(sum(map(math.prod, shapes)),)] if dialect.packed else shapes
    outputs = (PACKED,) if dialect.packed else ("frames", *cache_names(len(given), new=True))
    yield Part("vae_first", first, (latent,), outputs)
    caches = (
        TensorSpec(name, shape, options.vae_caches) for name, shape in zip(cache_names(len(given)), given, strict=True)
    )
    yield Part("vae_next", later, (latent, *caches), outputs)


def tile_plan(checkpoint: Checkpoint, options: Options) -> TilePlan:
    """The tiles that frames are decoded in: one of the frame's size where they are decoded whole."""
    height, width = checkpoint.model.pyramid.stages[0].latent[2:]
    tile = options.vae_tile or (height, width)
    return TilePlan((height, width), (min(tile[0], height), min(tile[1], width)))


def choose_tile(checkpoint: Checkpoint, caches: str = "float32") -> tuple[int, int] | None:
    """The tile that costs the least beyond the frame and whose decoding fits `VAE_BUDGET`; None if the frame does.

    Thin strips would cost even less, but show a pixel near their edge little of what is around it.
    """
    frame = checkpoint.model.pyramid.stages[0].latent[2:]
    shapes = VaeGraph(checkpoint, "float32", "float32", first=True).cache_shapes(LEAST_CHOSEN, LEAST_CHOSEN)
    per_pixel = 4 * sum(math.prod(shape) for shape in shapes) / LEAST_CHOSEN**2
    kept = 0.5 if caches == "float16" else 1.0

    def estimate(height: int, width: int) -> float:
        pixels = height * width
        # The decoder's attention, near its start, holds its scores and their softmax beside the old caches.
        return max((2 * kept + ACTIVATIONS) * per_pixel * pixels, kept * per_pixel * pixels + 2 * 4 * pixels**2)

    if estimate(*frame) <= VAE_BUDGET:
        return None
    sizes = [sorted({_cover(size, count) for count in range(1, 65)}) for size in frame]
    plans = [TilePlan(frame, (h, w)) for h in sizes[0] for w in sizes[1] if estimate(h, w) <= VAE_BUDGET]
    return min(plans, key=lambda plan: (plan.overhead, plan.count)).tile if plans else (sizes[0][0], sizes[1][0])


def _cover(size: int, count: int) -> int:
    """The smallest tile of which `count`, overlapping by a quarter, cover a length."""
    return next(
        tile
        for tile in range(min(LEAST_CHOSEN, size), size + 1)
        if len(TilePlan((size, size), (tile, tile)).rows) <= count
    )


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
