"""The layers of a stage's ONNX graph, found by the names of their parameters."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.bundle.graphs import STAGE, GraphKey
from ...runtime.bundle.opening import Bundle
from ...runtime.errors import UsageError

__all__ = ["constant", "holds_models", "layer_nodes", "stage_model"]


def holds_models(bundle: Bundle) -> bool:
    """Whether the graphs of a bundle's stages are ONNX files."""
    return all(
        bundle.file(entry.file).suffix == ".onnx" for key, entry in bundle.manifest.graphs.items() if key.role == STAGE
    )


def stage_model(bundle: Bundle, key: GraphKey) -> ir.Model:
    """The graph of a stage, its weights left in their file.

    Raises:
        UsageError: the bundle is not one of ONNX graphs.
    """
    file = bundle.file(bundle.manifest.graphs[key].file)
    if file.suffix != ".onnx":
        raise UsageError("only a bundle of ONNX graphs can be bisected: its stage is evaluated block by block")
    return ir.load(file)


def layer_nodes(model: ir.Model, layer: str) -> list[ir.Node]:
    """The nodes that give a layer's output, in order: several where it runs in pieces of tokens.

    Its bias goes into the last node of each piece, however its weights are stored.

    Args:
        model: the graph of a stage.
        layer: the layer's name in the module that the graph was made of.
    """
    bias = model.graph.initializers.get(f"{layer}.bias")
    given = set() if bias is None else {use.node for use in bias.uses()}
    return [node for node in model.graph if node in given]


def constant(value: ir.Value) -> NDArray[Any]:
    """What a graph's initializer holds; its file may be a link, as in a hub's cache, which onnx-ir does not follow."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(int(n) for n in tensor.shape.numpy())
    return np.fromfile(tensor.path, tensor.dtype.numpy(), math.prod(shape), offset=tensor.offset or 0).reshape(shape)
