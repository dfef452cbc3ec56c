"""Everything about a bundle that is known before any of it is written: its graphs, its files, and where weights lie."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...runtime.bundle.graphs import FIRST, LATENT, TEXT, Decoder, GraphKey, GraphSpec, graph_specs, stage_key
from ...runtime.bundle.manifest import WEIGHTS_FILE
from ...runtime.chain.pyramid import Resolution, Stage
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.safetensors import TensorEntry
from ...runtime.quantisation import SCHEMES
from ...targets.dialect import Dialect
from ...targets.facts import BuildTarget
from ..families import decoder_modules, modules_of
from ..families.layers import CALIBRATION
from ..lowering.graphs import GraphModule
from ..weights.places import Places, place_weights
from ..weights.source import Source, sources_of
from ..weights.steps import Cast
from .options import BuildOptions

__all__ = ["LOWERING_FILE", "Blueprint", "draw", "text_lengths"]

LOWERING_FILE = "lowering.bin"
"""Weights that a target stores in its own programs, as long as it is at work."""

TEXT_LENGTHS = (64, 128, 256)
"""Static lengths of the text encoder below the model's own; a prompt takes the shortest that holds it."""

TABLE = "shared.weight"


@dataclass(frozen=True)
class Blueprint:
    """A bundle to be made."""

    checkpoint: Checkpoint
    target: BuildTarget
    options: BuildOptions
    dialect: Dialect
    lengths: tuple[int, ...]
    decoders: Mapping[Resolution, Sequence[Decoder]]
    """How frames of each resolution are decoded."""
    specs: Mapping[Resolution, Mapping[GraphKey, GraphSpec]]
    """The graphs of each resolution: see `graph_specs`."""
    programs: Mapping[str, tuple[GraphModule, ...]]
    """The graphs of each file, by its name without suffix."""
    table: Source | None
    """The text encoder's embeddings, which no graph holds."""
    files: Mapping[str, Places]
    """Where weights lie in each file that is filled with them."""

    @property
    def tensors(self) -> Mapping[str, Mapping[str, TensorEntry]]:
        """What weights come from: the tensors of each component, and those of a recipe."""
        recipe = self.options.calibration
        return self.checkpoint.components | ({} if recipe is None else {CALIBRATION: recipe.tensors})

    def weights_of(self, program: str) -> str:
        """The file that the graphs of a program find their weights in."""
        component = self.programs[program][0].spec.key.component
        return LOWERING_FILE if self.target.holds(component, self.options.target) else WEIGHTS_FILE

    @property
    def nbytes(self) -> int:
        """Bytes of all weights files."""
        return sum(places.nbytes for places in self.files.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, without padding."""
        return sum(places.weight_bytes for places in self.files.values())

    def files_of(self, program: str) -> tuple[str, ...]:
        """Names of a program's files; sessions are given the first one."""
        specs = [graph.spec for graph in self.programs[program]]
        return self.target.files(program, specs, self.options.target)


def draw(checkpoint: Checkpoint, target: BuildTarget, options: BuildOptions) -> Blueprint:
    """Plan a bundle; nothing is read but headers, and nothing is written."""
    dialect = target.dialect_of(options.target)
    lengths = text_lengths(checkpoint) if checkpoint.text_encoder else ()
    decoders = options.decoders_of(checkpoint, packed=target.packs_caches)
    specs = graph_specs(options.model(checkpoint), decoders, lengths)
    graphs = list(_graph_modules(checkpoint, target, options, dialect, decoders, specs))
    table = _table(checkpoint, options)
    own, mapped = list[Source](), list[Source]()
    for graph in graphs:
        (own if target.holds(graph.spec.key.component, options.target) else mapped).extend(
            sources_of(graph.module).values()
        )
    lying = {LOWERING_FILE: own, WEIGHTS_FILE: [*mapped, *([] if table is None else [table])]}
    files = {name: place_weights(sources) for name, sources in lying.items() if sources}
    programs = _programs(graphs, target)
    return Blueprint(checkpoint, target, options, dialect, lengths, decoders, specs, programs, table, files)


def text_lengths(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Static lengths of the text encoder, increasing; the last is the model's text length."""
    longest = checkpoint.model.text_length
    return (*(length for length in TEXT_LENGTHS if length < longest), longest)


def _table(checkpoint: Checkpoint, options: BuildOptions) -> Source | None:
    """The text encoder's embeddings, stored as its matrices are, or as in the checkpoint where these are quantised."""
    if not checkpoint.text_encoder:
        return None
    entry = checkpoint.text_encoder[TABLE]
    quantised = "text_encoder" in options.quantised
    dtype = entry.values if quantised else SCHEMES[options.precision["text_encoder"]].dtype
    return Source.of("text_encoder", TABLE, entry, (Cast(dtype),))


def _graph_modules(
    checkpoint: Checkpoint,
    target: BuildTarget,
    options: BuildOptions,
    dialect: Dialect,
    decoders: Mapping[Resolution, Sequence[Decoder]],
    specs: Mapping[Resolution, Mapping[GraphKey, GraphSpec]],
) -> Iterator[GraphModule]:
    """A module for each graph; where the target takes symbolic shapes, one for all that differ in these alone."""
    family, model = modules_of(checkpoint.model.family), checkpoint.model
    stages = [
        (specs[resolution][stage_key(stage.index, expert)], stage)
        for resolution in specs
        for stage in model.stages(resolution)
        for expert in model.pyramid.experts(stage.index)
    ]
    if target.symbolic and not target.separates_graphs(options.target) and not model.pyramid.kind.own_patch_layers:
        for alike in _alike(stages):
            yield from _symbolic_stages(checkpoint, options, dialect, alike)
    else:
        for spec, stage in stages:
            recipe = options.recipe(checkpoint, spec.key.component, stage.index)
            module, layers = family.stage_graph(checkpoint, spec.key.weights, stage, recipe, dialect)
            yield GraphModule(spec, module, layers=layers)
    every = {spec.name: (spec, resolution) for resolution in specs for spec in specs[resolution].values()}
    texts = [spec for spec, _ in every.values() if spec.key.role == TEXT]
    if target.symbolic and texts:
        yield from _symbolic_texts(checkpoint, options, dialect, texts)
    else:
        for spec in texts:
            recipe = options.recipe(checkpoint, spec.key.component)
            yield GraphModule(spec, family.text_graph(checkpoint, spec.key.length, recipe, dialect))
    for spec, resolution in every.values():
        for decoder in decoders[resolution]:
            if spec.key.decoder == decoder.component:
                recipe, first = options.recipe(checkpoint, decoder.component), spec.key.role == FIRST
                modules = decoder_modules(model.family, decoder.component)
                yield GraphModule(spec, modules.decoder_graph(checkpoint, decoder, recipe, dialect, first=first))


def _alike(stages: Sequence[tuple[GraphSpec, Stage]]) -> list[list[tuple[GraphSpec, Stage]]]:
    """Stages of one network whose inputs have the same shapes but for the latent's."""
    found: dict[Any, list[tuple[GraphSpec, Stage]]] = {}
    for spec, stage in stages:
        others = tuple(tensor for tensor in spec.inputs if tensor.name != LATENT)
        found.setdefault((spec.key.expert, others), []).append((spec, stage))
    return list(found.values())


def _symbolic_stages(
    checkpoint: Checkpoint, options: BuildOptions, dialect: Dialect, stages: Sequence[tuple[GraphSpec, Stage]]
) -> Iterator[GraphModule]:
    """The graph of the largest stage is that of all."""
    spec, largest = max(stages, key=lambda pair: pair[1].tokens)
    family, recipe = modules_of(checkpoint.model.family), options.recipe(checkpoint, "transformer")
    module, layers = family.stage_graph(checkpoint, spec.key.weights, largest, recipe, dialect)
    symbols = _symbols("latent", [(1, *stage.latent) for _, stage in stages], [1, 1, *largest.patch_size])
    for spec, _ in stages:
        yield GraphModule(spec, module, symbols, layers)


def _symbolic_texts(
    checkpoint: Checkpoint, options: BuildOptions, dialect: Dialect, specs: Sequence[GraphSpec]
) -> Iterator[GraphModule]:
    """The graph of the longest length is that of all."""
    lengths = [spec.key.length for spec in specs]
    recipe = options.recipe(checkpoint, "text_encoder")
    module = modules_of(checkpoint.model.family).text_graph(checkpoint, lengths[-1], recipe, dialect)
    symbols: dict[str, Mapping[int, Any]] = {}
    if len(lengths) > 1:
        length = torch.export.Dim("L", min=lengths[0], max=lengths[-1])
        symbols = {"embeddings": {1: length}, "mask": {1: length}}
    for spec in specs:
        yield GraphModule(spec, module, symbols)


def _symbols(name: str, shapes: Sequence[tuple[int, ...]], steps: Sequence[int]) -> dict[str, Mapping[int, Any]]:
    """A symbol for each axis in which shapes differ, a multiple of the axis's step."""
    axes = {}
    for axis, step in enumerate(steps):
        counts = {shape[axis] // step for shape in shapes}
        if len(counts) > 1:
            count: Any = torch.export.Dim(f"{name}_{axis}", min=min(counts), max=max(counts))
            axes[axis] = count if step == 1 else step * count
    return {name: axes} if axes else {}


def _programs(graphs: Sequence[GraphModule], target: BuildTarget) -> dict[str, tuple[GraphModule, ...]]:
    """The graphs of each file: one, or those that are alike; of a network, those that share it."""
    if not target.joins_graphs:
        return {graph.spec.name: (graph,) for graph in graphs}
    joined: dict[str, list[GraphModule]] = {}
    for graph in graphs:
        joined.setdefault(graph.spec.key.program, []).append(graph)
    programs: dict[str, tuple[GraphModule, ...]] = {}
    for name, group in joined.items():
        networks: dict[int, list[GraphModule]] = {}
        for graph in group:
            networks.setdefault(id(graph.module) if target.symbolic else 0, []).append(graph)
        for own in networks.values():
            size = own[0].spec.key.resolution
            joint = f"{name}_{size}" if size and len(networks) > 1 else name
            programs[joint if len(own) > 1 or len(networks) == 1 else own[0].spec.name] = tuple(own)
    return programs
