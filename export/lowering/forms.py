"""From the graphs of a program to the form that a target takes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn
from torch.export import ExportedProgram

from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import CheckFailed
from ...targets.dialect import Dialect
from ...targets.forms import OnnxForm, Placement, TorchForm, TorchLayer
from ..weights.places import Places
from ..weights.source import Source, sources_of
from .graphs import GraphModule
from .onnx import export_onnx
from .program import export_program, map_weights
from .repeat import as_calls, export_layer, kinds_of

__all__ = ["make_forms"]


def make_forms(
    kind: type[Any], name: str, graphs: Sequence[GraphModule], dialect: Dialect, places: Places, weights: Path
) -> list[Any]:
    """The forms of a program's graphs: one for each module.

    Args:
        kind: `OnnxForm` or `TorchForm`.
        name: the program's name.
        graphs: the graphs that it holds; those that share a module become one form.
        dialect: the dialect that they are written in.
        places: where their weights lie.
        weights: the file that these are in.

    Raises:
        CheckFailed: a module gives other outputs than its graph's specification says.
    """
    modules = {id(graph.module): graph for graph in graphs}
    return [
        _MAKERS[kind](
            name if len(modules) == 1 else first.spec.name,
            [graph for graph in graphs if graph.module is first.module],
            dialect,
            places.of,
            weights,
        )
        for first in modules.values()
    ]


def _onnx_form(
    name: str, graphs: Sequence[GraphModule], dialect: Dialect, places: Mapping[Source, Placement], weights: Path
) -> OnnxForm:
    exported = export_onnx(max(graphs, key=_generality), dialect, name)
    for graph in graphs:
        _check_outputs(graph.spec, _onnx_outputs(exported.model, graph.spec))
    placements = {weight: places[source] for weight, source in exported.sources.items()}
    return OnnxForm(name, exported.model, placements, weights, tuple(graph.spec for graph in graphs))


def _torch_form(
    name: str, graphs: Sequence[GraphModule], dialect: Dialect, places: Mapping[Source, Placement], weights: Path
) -> TorchForm:
    (graph,) = graphs
    sources, kinds = sources_of(graph.module), kinds_of(graph.layers, constants=True)
    with as_calls(kinds):
        program = export_program(graph.module, graph.spec.inputs)
    layers = tuple(_torch_layer(alike[0], program, places, weights) for alike in kinds)
    map_weights(program, sources, places, weights)
    values = [node.meta["val"] for node in program.graph.output_node().args[0]]
    _check_outputs(graph.spec, [(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for v in values])
    placements = {parameter: places[source] for parameter, source in sources.items()}
    return TorchForm(graph.spec.name, program, placements, weights, (graph.spec,), layers)


def _torch_layer(
    layer: nn.Module, program: ExportedProgram, places: Mapping[Source, Placement], weights: Path
) -> TorchLayer:
    exported, _ = export_layer(layer, program)
    sources = sources_of(layer)
    map_weights(exported, sources, places, weights)
    return TorchLayer(exported, {name: places[source] for name, source in sources.items()}, tuple(sources))


_MAKERS: Mapping[type[Any], Callable[..., Any]] = {OnnxForm: _onnx_form, TorchForm: _torch_form}


def _generality(graph: GraphModule) -> int:
    """How far the axes that vary are from 1, which tracing would take for a constant."""
    shapes = {spec.name: spec.shape for spec in graph.spec.inputs}
    return min((shapes[name][axis] for name, axes in graph.symbols.items() for axis in axes), default=0)


def _onnx_outputs(model: ir.Model, spec: GraphSpec) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a model's outputs, its symbolic axes being those of a graph's inputs."""
    sizes = {
        str(axis): size
        for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True)
        for axis, size in zip(value.shape or (), tensor.shape, strict=True)
    }
    return [
        (
            tuple(sizes[str(axis)] if str(axis) in sizes else int(str(axis)) for axis in value.shape or ()),
            str(value.dtype.numpy()) if value.dtype else "",
        )
        for value in model.graph.outputs
    ]


def _check_outputs(spec: GraphSpec, found: Sequence[tuple[tuple[int, ...], str]]) -> None:
    wanted = [(tensor.shape, tensor.dtype) for tensor in spec.outputs]
    if list(found) != wanted:
        raise CheckFailed(f"graph {spec.name}: expected outputs {wanted}, its module gives {list(found)}"[:400])
