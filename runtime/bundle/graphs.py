"""The graphs of a bundle: which there are, and what goes in and comes out.

Export makes them, a manifest is checked against them, the pipeline feeds them, and parity and measurements walk them.
Nobody else knows a graph's name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..chain.pyramid import Resolution
from ..model.description import Model
from .tiles import Tiles

__all__ = [
    "FIRST",
    "FRAMES",
    "LATENT",
    "NEXT",
    "PACKED",
    "STAGE",
    "TEXT",
    "Decoder",
    "GraphKey",
    "GraphSpec",
    "TensorSpec",
    "cache_names",
    "decoder_key",
    "graph_specs",
    "stage_key",
    "text_key",
]

STAGE, TEXT, FIRST, NEXT = "stage", "text", "first", "next"
"""Roles of graphs: a stage of the transformer, the text encoder, and a decoder's first and later latent frames."""

LATENT, FRAMES = "latent", "frames"
PACKED = "packed"
"""Output of a decoder whose frames and new caches are one flat tensor, in this order."""

_COMPONENTS = {STAGE: "transformer", TEXT: "text_encoder"}
_EXPERTS = ("transformer", "transformer_2")
"""The components of a model of several networks."""

_PROGRAMS = {"transformer": "stages", "text_encoder": "text", "vae": "vae", "tiny_decoder": "tiny"}
"""Name of a component's program; those of decoders' graphs begin with it."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a graph's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def to_json(self) -> dict[str, Any]:
        """Its entry in a manifest, where its name is the key."""
        return {"shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class GraphKey:
    """What a graph is for."""

    role: str
    stage: int = 0
    """Index of the stage that a stage's graph is of."""
    expert: int = 0
    """Index of the network that it is, of a model that has several."""
    resolution: Resolution | None = None
    """What it is made for; None: the first resolution of the bundle."""
    length: int = 0
    """Tokens that a text encoder's graph takes."""
    decoder: str = ""
    """Component that a decoder's graph is of."""

    @property
    def name(self) -> str:
        """Its name in files, manifests and tables."""
        own = {STAGE: f"stage{self.stage}", TEXT: f"text_{self.length}"}.get(self.role)
        own = own or f"{_PROGRAMS[self.decoder]}_{self.role}"
        return (
            own + (f"_expert{self.expert}" if self.expert else "") + (f"_{self.resolution}" if self.resolution else "")
        )

    @property
    def component(self) -> str:
        """The component that it is of: what its precision is chosen for."""
        return self.decoder or _COMPONENTS[self.role]

    @property
    def weights(self) -> str:
        """The checkpoint's component that it is made of."""
        return _EXPERTS[self.expert] if self.role == STAGE else self.component

    @property
    def program(self) -> str:
        """Name of the file that it shares with others like it, where graphs share files."""
        return _PROGRAMS[self.component] + (f"_expert{self.expert}" if self.expert else "")


def stage_key(stage: int, expert: int = 0, resolution: Resolution | None = None) -> GraphKey:
    """The graph of a stage."""
    return GraphKey(STAGE, stage=stage, expert=expert, resolution=resolution)


def text_key(length: int) -> GraphKey:
    """The graph of the text encoder at a length."""
    return GraphKey(TEXT, length=length)


def decoder_key(component: str, *, first: bool, resolution: Resolution | None = None) -> GraphKey:
    """The graph of a decoder for the first latent frame, or for a later one."""
    return GraphKey(FIRST if first else NEXT, resolution=resolution, decoder=component)


@dataclass(frozen=True)
class GraphSpec:
    """A graph's inputs and outputs, in order."""

    key: GraphKey
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """See `GraphKey.name`."""
        return self.key.name


@dataclass(frozen=True)
class Decoder:
    """How frames are decoded."""

    component: str
    """What decodes them, of `DECODERS`."""
    tiles: Tiles
    """How a frame is cut: into one tile as large as itself where it is decoded whole."""
    caches: str
    """Dtype of what is kept from frame to frame."""
    packed: bool = False
    """Caches are one flat tensor, and frames and new caches another."""


def cache_names(count: int, *, new: bool = False) -> list[str]:
    """Names of the caches that a decoder graph takes, or of the new ones that it gives."""
    return [f"new_cache_{index}" if new else f"cache_{index}" for index in range(count)]


def graph_specs(
    model: Model, decoders: Mapping[Resolution, Sequence[Decoder]], lengths: Sequence[int] = ()
) -> dict[Resolution, dict[GraphKey, GraphSpec]]:
    """Every graph of a model at each of its resolutions, stages from the finest on.

    Text encoders are the same at all of them, and so are decoders whose tiles are.

    Args:
        model: the model that the graphs are of.
        decoders: what the stages sample at, and how frames are decoded; the first resolution is the default.
        lengths: static lengths of the text encoder's graphs; none where there is no text encoder.

    Returns:
        Specifications by the key that a run at the resolution knows them by, which says no resolution.
    """
    texts, tiles = _text_specs(model, lengths), dict[tuple[str, tuple[int, int]], Resolution | None]()
    found = {}
    for index, (resolution, each) in enumerate(decoders.items()):
        own = resolution if index else None
        specs = _stage_specs(model, resolution, own) + texts
        for decoder in each:
            owner = tiles.setdefault((decoder.component, decoder.tiles.tile), own)
            keys = (decoder_key(decoder.component, first=first, resolution=owner) for first in (True, False))
            specs += [_decoder_spec(model, decoder, key) for key in keys]
        found[resolution] = {replace(spec.key, resolution=None): spec for spec in specs}
    return found


def _stage_specs(model: Model, resolution: Resolution, own: Resolution | None) -> list[GraphSpec]:
    specs = []
    for stage in model.stages(resolution):
        inputs = model.family.stage_inputs(model.transformer, stage, model.text_length)
        velocity = TensorSpec("velocity", (1, *stage.latent))
        for expert in model.pyramid.experts(stage.index):
            specs.append(GraphSpec(stage_key(stage.index, expert, own), _specs(inputs), (velocity,)))
    return specs


def _text_specs(model: Model, lengths: Sequence[int]) -> list[GraphSpec]:
    specs, width = [], model.transformer.text_dim
    for length in lengths:
        inputs = {"embeddings": (1, length, width), "mask": (1, length)}
        specs.append(GraphSpec(text_key(length), _specs(inputs), (TensorSpec("text", (1, length, width)),)))
    return specs


def _specs(shapes: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, shape) for name, shape in shapes.items())


def _decoder_spec(model: Model, decoder: Decoder, key: GraphKey) -> GraphSpec:
    first = key.role == FIRST
    (height, width), geometry = decoder.tiles.tile, model.pyramid.geometry
    latent = TensorSpec(LATENT, (1, geometry.channels, height, width))
    frames = (1 if first else geometry.temporal, 3, geometry.spatial * height, geometry.spatial * width)
    shapes = model.decoders[decoder.component].cache_shapes(height, width)
    if decoder.packed:
        kept = sum(map(math.prod, shapes))
        outputs: tuple[TensorSpec, ...] = (TensorSpec(PACKED, (math.prod(frames) + kept,), decoder.caches),)
        shapes = [(kept,)]
    else:
        new = zip(cache_names(len(shapes), new=True), shapes, strict=True)
        outputs = (TensorSpec(FRAMES, frames), *(TensorSpec(name, shape, decoder.caches) for name, shape in new))
    old = zip(cache_names(len(shapes)), shapes, strict=True)
    caches = () if first else tuple(TensorSpec(name, shape, decoder.caches) for name, shape in old)
    return GraphSpec(key, (latent, *caches), outputs)
