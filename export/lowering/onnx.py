"""From a graph's module to an ONNX model without weights: fake tensors go through the exporter, no value is read."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript import opset23, optimizer
from torch import nn

from ...targets.forms import TensorSpec
from ..families.layers import Source, sources_of
from .repeat import CALL, add_function, are_alike, as_calls, trace_layer
from .torch import trace

__all__ = ["OPSET", "STANDARD_OPERATORS", "Graph", "export_onnx"]

OPSET = 23


class Graph:
    """An ONNX model whose large initializers have no values yet, and where each of them comes from."""

    def __init__(self, model: ir.Model, sources: Mapping[str, Source]) -> None:
        """A model and the sources of its initializers, by name."""
        self.model, self.sources = model, sources


def _schema(name: str, inputs: Sequence[str], types: Mapping[str, list[str]], attributes: Sequence[str]) -> Any:
    """An operator of ONNX Runtime's own domain, of which the onnx package has no schema."""
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(f"input_{i}", kind) for i, kind in enumerate(inputs)],
        outputs=[OpSchema.FormalParameter("output", inputs[0])],
        type_constraints=[(kind, allowed, "") for kind, allowed in types.items()],
        attributes=[OpSchema.Attribute(attribute, OpSchema.AttrType.INT, required=True) for attribute in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, schema)


_FLOAT = {"T": ["tensor(float)"]}
_MATMUL_N_BITS = _schema(
    "MatMulNBits",
    ["T", "B", "T"],
    _FLOAT | {"B": ["tensor(uint8)"]},
    ["K", "N", "bits", "block_size", "accuracy_level"],
)
_MULTI_HEAD_ATTENTION = _schema("MultiHeadAttention", ["T", "T", "T"], _FLOAT, ["num_heads"])
_ROTARY_EMBEDDING = _schema(
    "RotaryEmbedding", ["T", "I", "T", "T"], _FLOAT | {"I": ["tensor(int64)"]}, ["interleaved", "num_heads"]
)


def _attention(query: Any, key: Any, value: Any, heads: int) -> Any:
    return _MULTI_HEAD_ATTENTION(query, key, value, num_heads=heads)


def _rotary_embedding(x: Any, cos: Any, sin: Any, heads: int) -> Any:
    first = opset23.Constant(value=onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    return _ROTARY_EMBEDDING(x, first, cos, sin, interleaved=1, num_heads=heads)


def _quantised_product(x: Any, values: Any, scales: Any, bits: int, block: int) -> Any:
    sizes = {"K": int(x.shape[-1]), "N": int(values.shape[0])}
    # Level 1: the product itself in float32.
    return _MATMUL_N_BITS(x, values, scales, bits=bits, block_size=block, accuracy_level=1, **sizes)


ORT_OPERATORS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.pyrexport.attention.default: _attention,
    torch.ops.pyrexport.rotary_embedding.default: _rotary_embedding,
    torch.ops.pyrexport.quantised_product.default: _quantised_product,
}
"""Operators of ONNX Runtime: attention that never holds the scores, rotation without scatter, weights of few bits."""


def _standard_attention(query: Any, key: Any, value: Any, heads: int) -> Any:
    out, *_ = opset23.Attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)
    return out


STANDARD_OPERATORS: Mapping[Any, Callable[..., Any]] = {torch.ops.pyrexport.attention.default: _standard_attention}
"""Operators of the ONNX standard alone."""


def export_onnx(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    name: str,
    *,
    operators: Mapping[Any, Callable[..., Any]] | None = None,
    symbols: Mapping[str, Mapping[int, Any]] | None = None,
    layers: Sequence[nn.Module] = (),
) -> Graph:
    """Export a graph's module.

    The weights keep the names of the module's parameters. Constants (positions, tables) stay in the model.

    Args:
        module: whose parameters have sources.
        inputs: see `trace`.
        outputs: their names.
        name: of the graph.
        operators: what each custom operator becomes; None: `ORT_OPERATORS`.
        symbols: see `trace`.
        layers: of the module, of one class and with the same settings, whose first input and only output are shaped alike;
            exported once where their parameters are alike too.
    """
    operators = ORT_OPERATORS if operators is None else operators
    sources = sources_of(module)
    for library in ("torch.onnx", "onnx_ir", "onnxscript"):  # they report what they leave alone
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        model = _export(module, inputs, outputs, operators, symbols, layers if are_alike(layers) else ())
    model.graph.name = name
    if operators is ORT_OPERATORS:
        model.opset_imports["com.microsoft"] = 1
    model.producer_name, model.producer_version = "pyrexport", None
    model.metadata_props.clear()  # among them a list of symbols in an order of chance
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        # Stack traces and module names of the machine that exported.
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    _simplify(model, sources)
    return Graph(model, {path: source for path, source in sources.items() if path in model.graph.initializers})


def _export(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    operators: Mapping[Any, Callable[..., Any]],
    symbols: Mapping[str, Mapping[int, Any]] | None,
    layers: Sequence[nn.Module],
) -> ir.Model:
    with as_calls(layers):
        program = trace(module, inputs, symbols)
    model = _translate(program, inputs, outputs, {**operators, **CALL})
    if layers:
        layer, specs = trace_layer(layers[0], program)
        add_function(model, _translate(layer, specs, ["output"], operators), layers[0])
    return model


def _translate(
    program: Any, inputs: Sequence[TensorSpec], outputs: Sequence[str], operators: Mapping[Any, Callable[..., Any]]
) -> ir.Model:
    exported: Any = torch.onnx.export(
        program,
        optimize=False,
        opset_version=OPSET,
        verbose=False,
        custom_translation_table=dict(operators),
        input_names=[spec.name for spec in inputs],
        output_names=list(outputs),
    )
    model: ir.Model = exported.model
    return model


def _simplify(model: ir.Model, sources: Mapping[str, Source]) -> None:
    """Fold shapes and drop detours. The weights are inputs meanwhile: no optimiser can fold what has no value."""
    weights = [value for name, value in model.graph.initializers.items() if name in sources]
    for value in weights:
        del model.graph.initializers[value.name or ""]
        value.const_value = None
    model.graph.inputs.extend(weights)
    # onnxscript's whole optimizer adds pattern rules, whose time grows with the square of the blocks and one of which drops
    # the epsilon of the VAE's norms as a zero.
    if model.functions:  # smaller before they are repeated
        optimizer.fold_constants(model, output_size_limit=4096)
        RemoveUnusedNodesPass()(model)
        InlinePass()(model)
    optimizer.fold_constants(model, output_size_limit=4096)
    for tidy in (
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        NameFixPass(),
        ShapeInferencePass(),
    ):
        tidy(model)
    for value in weights:
        model.graph.inputs.remove(value)
        if value.uses():
            model.graph.initializers[value.name or ""] = value
    _expand_late(model.graph)


def _expand_late(graph: ir.Graph) -> None:
    """Put the casts of 16-bit weights first: of two inputs ONNX Runtime evaluates the one that stands later first.

    Where they stand beside their products, all weights are expanded before the first block is evaluated.
    """
    casts = [node for node in graph if node.op_type == "Cast" and node.inputs[0] and node.inputs[0].is_initializer()]
    if casts:
        graph.remove(casts)
        graph.insert_before(graph[0], casts)
