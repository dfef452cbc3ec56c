"""Shapes of the values of a network, whose own may be symbolic, in each of the graphs that it is."""

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from onnxscript import optimizer

from ..runtime.bundle.graphs import GraphSpec
from .forms import OnnxForm

__all__ = ["Shapes", "shapes_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""Of values, by their names."""


def shapes_of(form: OnnxForm) -> list[Shapes]:
    """The shape of each value in each graph of a network, but for what sizes alone decide.

    Sizes of the graph's inputs are folded into a copy of the network, since a block has symbols of its own for what its
    inputs' symbols decide.
    """
    values = [value for node in form.model.graph for value in node.outputs]
    if all(value.shape is not None and value.shape.is_static() for value in values):
        found = _read([*form.model.graph.inputs, *values])
        return [found] * len(form.graphs)
    return [_fixed(form, spec) for spec in form.graphs]


def _fixed(form: OnnxForm, spec: GraphSpec) -> Shapes:
    model = form.model.clone()
    graph = model.graph
    for name in form.placements:  # inputs meanwhile: nothing can be folded that has no value
        weight = graph.initializers.pop(name)
        weight.const_value = None
        graph.inputs.append(weight)
    for node in graph:
        for value in node.outputs:
            value.shape = None
    shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    optimizer.fold_constants(model, output_size_limit=4096, onnx_shape_inference=True)
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True))
    return _read([*inferred.graph.inputs, *(value for node in inferred.graph for value in node.outputs)])


def _read(values: Sequence[ir.Value]) -> Shapes:
    """The shapes that are known."""
    return {
        str(value.name): tuple(int(size) for size in value.shape.numpy())
        for value in values
        if value.shape is not None and value.shape.is_static()
    }
