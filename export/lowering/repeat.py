"""Layers that are alike are exported once: thirty blocks are one block, thirty times.

While the whole module is traced, each of them is one operator. One is exported by itself, as the ONNX function that
these operators call; inlined, the graph is what the exporter would have made of all of them, but for a few operators
that compute sizes where these are symbolic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import nn
from torch.export import Dim, ExportedProgram

from ...runtime.bundle.graphs import TensorSpec
from ..weights.steps import TORCH_DTYPES
from .program import export_program

__all__ = ["CALL", "add_function", "are_alike", "as_calls", "export_layer"]

DOMAIN, NAME = "pyrexport", "Layer"


@torch.library.custom_op("pyrexport::layer", mutates_args=())
def layer(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """A layer whose output is shaped as its first input. Only its shape is asked for: nothing is computed by it."""
    raise RuntimeError("a layer that stands for a call has no values")


@layer.register_fake
def _(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(inputs[0])


_SCHEMA = OpSchema(
    NAME,
    DOMAIN,
    1,
    inputs=[
        OpSchema.FormalParameter(
            "inputs", "V", param_option=OpSchema.FormalParameterOption.Variadic, is_homogeneous=False
        )
    ],
    outputs=[OpSchema.FormalParameter("output", "V")],
    type_constraints=[("V", [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int8", "uint8")], "")],
)
_LAYER = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), NAME, _SCHEMA)
CALL: Mapping[Any, Callable[..., Any]] = {
    torch.ops.pyrexport.layer.default: lambda inputs, weights: _LAYER(*inputs, *weights)
}
"""What the exporter makes of a call."""


@contextmanager
def as_calls(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, each of the layers is traced as a call."""
    for each in layers:
        each.forward = partial(_call, each)
    try:
        yield
    finally:
        for each in layers:
            del each.forward


def _call(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.pyrexport.layer(list(inputs), list(module.parameters()))
    return out


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether there are several, and their parameters have the same names, shapes and dtypes and are all they hold."""
    kinds = {tuple((name, tuple(p.shape), p.dtype) for name, p in each.named_parameters()) for each in layers}
    return len(layers) > 1 and len(kinds) == 1 and not any(True for each in layers for _ in each.buffers())


def export_layer(module: nn.Module, program: ExportedProgram) -> tuple[ExportedProgram, list[TensorSpec]]:
    """Export one layer with inputs like those of its calls in a program, and describe these."""
    call = next(node for node in program.graph.nodes if node.target is torch.ops.pyrexport.layer.default)
    values = [node.meta["val"] for node in call.args[0]]
    sizes: dict[str, Any] = {}
    axes: dict[str, dict[int, Any]] = {}
    for index, value in enumerate(values):
        symbolic = {axis: str(size) for axis, size in enumerate(value.shape) if not isinstance(size, int)}
        axes[f"input_{index}"] = {
            axis: sizes.setdefault(size, Dim(f"size_{len(sizes)}", min=2)) for axis, size in symbolic.items()
        }
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [
        TensorSpec(f"input_{index}", tuple(_hint(size) for size in value.shape), names[value.dtype])
        for index, value in enumerate(values)
    ]
    return export_program(module, specs, axes if sizes else None), specs


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def add_function(model: ir.Model, layer_model: ir.Model, module: nn.Module) -> None:
    """Give a model the function that its calls name: the graph of a layer's model, with its weights as inputs too."""
    graph = layer_model.graph
    for name in dict(module.named_parameters()):
        value = graph.initializers.pop(name, None) or ir.Value(name=name)
        value.const_value = None
        graph.inputs.append(value)
    model.functions.update(layer_model.functions)
    function = ir.Function(DOMAIN, NAME, graph=graph, attributes=[])
    model.functions[function.identifier()] = function
