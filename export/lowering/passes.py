"""What is done to an exported ONNX model before a target gets it: shapes folded, detours and provenance dropped."""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript import optimizer

from ..weights.source import Source

__all__ = ["anonymise", "simplify"]


def anonymise(model: ir.Model, name: str) -> None:
    """Remove what differs between machines and processes: stack traces, module names, and their orders of chance."""
    model.graph.name = name
    model.producer_name, model.producer_version = "pyrexport", None
    model.metadata_props.clear()  # among them a list of symbols in an order of chance
    model.graph.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def simplify(model: ir.Model, sources: Mapping[str, Source]) -> None:
    """Fold shapes and drop detours. The weights are inputs meanwhile: no optimiser can fold what has no value."""
    weights = [value for name, value in model.graph.initializers.items() if name in sources]
    for value in weights:
        del model.graph.initializers[value.name or ""]
        value.const_value = None
    model.graph.inputs.extend(weights)
    # onnxscript's whole optimizer adds pattern rules, whose time grows with the square of the blocks and one of which
    # drops the epsilon of the VAE's norms as a zero.
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
