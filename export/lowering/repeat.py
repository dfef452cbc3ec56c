"""Layers that are alike are exported once: thirty blocks are one block, thirty times.

While the whole module is traced, each of them is one operator. One of each kind is exported by itself, as the ONNX
function that these operators call; inlined, the graph is what the exporter would have made of all of them, but for a
few operators that compute sizes where these are symbolic.
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

__all__ = ["add_function", "as_calls", "calls", "export_layer", "kinds_of"]

DOMAIN = "pyrexport"


@torch.library.custom_op("pyrexport::layer", mutates_args=())
def layer(kind: int, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """A layer whose output is shaped as its first input. Only its shape is asked for: nothing is computed by it."""
    raise RuntimeError("a layer that stands for a call has no values")


@layer.register_fake
def _(kind: int, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(inputs[0])


def _operator(name: str) -> Any:
    values = OpSchema.FormalParameter(
        "inputs", "V", param_option=OpSchema.FormalParameterOption.Variadic, is_homogeneous=False
    )
    types = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "float8e4m3fn", "int8", "uint8")]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[values],
        outputs=[OpSchema.FormalParameter("output", "V")],
        type_constraints=[("V", types, "")],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


def _name(kind: int) -> str:
    return f"Layer{kind}"


def calls(kinds: int) -> Mapping[Any, Callable[..., Any]]:
    """What the exporter makes of a call, of so many kinds of layers."""
    operators = [_operator(_name(kind)) for kind in range(kinds)]
    return {torch.ops.pyrexport.layer.default: lambda kind, inputs, weights: operators[kind](*inputs, *weights)}


@contextmanager
def as_calls(kinds: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
    """While it lasts, each layer of each kind is traced as a call."""
    layers = [(kind, each) for kind, alike in enumerate(kinds) for each in alike]
    for kind, each in layers:
        each.forward = partial(_call, kind, each)
    try:
        yield
    finally:
        for _, each in layers:
            del each.forward


def _call(kind: int, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.pyrexport.layer(kind, list(inputs), list(module.parameters()))
    return out


def kinds_of(layers: Sequence[nn.Module], *, constants: bool = False) -> list[list[nn.Module]]:
    """Layers by kind: those of one have parameters of the same names, shapes and dtypes, which are all they hold.

    None where nothing is repeated, or a layer holds anything else: with `constants`, buffers are those of the dialect,
    which are the same in layers of a kind.
    """
    kinds: dict[Any, list[nn.Module]] = {}
    for each in layers:
        kind = tuple((name, tuple(p.shape), p.dtype) for name, p in each.named_parameters())
        kinds.setdefault(kind, []).append(each)
    holds_more = any(True for each in layers for _ in each.buffers())
    if len(kinds) == len(layers) or (holds_more and not constants):
        return []
    return list(kinds.values())


def export_layer(module: nn.Module, program: ExportedProgram) -> tuple[ExportedProgram, list[TensorSpec]]:
    """Export one layer with inputs like those of calls in a program, alike for all kinds; describe them."""
    call = next(node for node in program.graph.nodes if node.target is torch.ops.pyrexport.layer.default)
    values = [node.meta["val"] for node in call.args[1]]
    sizes: dict[str, Any] = {}
    axes: dict[str, dict[int, Any]] = {}
    for index, value in enumerate(values):
        symbolic = {axis: size for axis, size in enumerate(value.shape) if not isinstance(size, int)}
        axes[f"input_{index}"] = {
            axis: sizes.setdefault(str(size), Dim(f"size_{len(sizes)}", min=_least(size)))
            for axis, size in symbolic.items()
        }
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [
        TensorSpec(f"input_{index}", tuple(_hint(size) for size in value.shape), names[value.dtype])
        for index, value in enumerate(values)
    ]
    return export_program(module, specs, axes if sizes else None), specs


def _least(size: Any) -> int:
    """The least that a symbolic size can be, of which a layer may cut off a fixed part; 2 for smaller ones."""
    return max(2, int(size.node.shape_env.bound_sympy(size.node.expr).lower))


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def add_function(model: ir.Model, kind: int, layer_model: ir.Model, module: nn.Module) -> None:
    """Give a model the function that calls of a kind name: a layer's graph, with its weights as inputs too."""
    graph = layer_model.graph
    for name in dict(module.named_parameters()):
        value = graph.initializers.pop(name, None) or ir.Value(name=name)
        value.const_value = None
        graph.inputs.append(value)
    model.functions.update(layer_model.functions)
    function = ir.Function(DOMAIN, _name(kind), graph=graph, attributes=[])
    model.functions[function.identifier()] = function
