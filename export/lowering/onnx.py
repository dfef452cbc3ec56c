"""From a graph's module to an ONNX model without weights: fake tensors go through the exporter, no value is read."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from ...runtime.bundle.graphs import TensorSpec
from ...targets.dialect import Dialect
from ...targets.tracing import lean_tracing
from ..weights.source import Source, sources_of
from .decompositions import decompose
from .graphs import GraphModule
from .passes import anonymise, simplify
from .program import export_program
from .repeat import add_function, as_calls, calls, export_layer, kinds_of

__all__ = ["OnnxExport", "export_onnx"]


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX model whose large initializers have no values yet, and where each of them comes from."""

    model: ir.Model
    sources: Mapping[str, Source]
    """The source of each, by the initializer's name, which is that of the module's parameter."""


def export_onnx(graph: GraphModule, dialect: Dialect, name: str) -> OnnxExport:
    """Export a graph's module.

    Constants (positions, tables) stay in the model.

    Args:
        graph: the graph to be made.
        dialect: the dialect that its module is written in.
        name: the model's name.
    """
    sources = sources_of(graph.module)
    with _quiet():
        model = _export(graph, dialect)
    model.opset_imports.update(dialect.domains)
    anonymise(model, name)
    simplify(model, sources)
    dialect.finish(model)
    kept = {path: source for path, source in sources.items() if path in model.graph.initializers}
    return OnnxExport(model, kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts, the exporter keeps to itself what it leaves alone, and what is deprecated inside it."""
    loggers = [logging.getLogger(library) for library in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _export(graph: GraphModule, dialect: Dialect) -> ir.Model:
    kinds = kinds_of(graph.layers)
    with as_calls(kinds):
        program = export_program(graph.module, graph.spec.inputs, graph.symbols)
    layers = [export_layer(first, program) for first, *_ in kinds]
    outputs = [spec.name for spec in graph.spec.outputs]
    model = _translate(program, graph.spec.inputs, outputs, dialect, {**dialect.operators, **calls(len(kinds))})
    for kind, ((first, *_), (layer, specs)) in enumerate(zip(kinds, layers, strict=True)):
        add_function(model, kind, _translate(layer, specs, ["output"], dialect, dialect.operators), first)
    return model


def _translate(
    program: Any,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    dialect: Dialect,
    operators: Mapping[Any, Callable[..., Any]],
) -> ir.Model:
    """The model of a program, whose graph is no longer its own afterwards."""
    decompose(program)
    export = partial(
        torch.onnx.export,
        program,
        optimize=False,
        opset_version=dialect.opset,
        verbose=False,
        custom_translation_table=dict(operators),
        input_names=[spec.name for spec in inputs],
        output_names=list(outputs),
    )
    try:
        with lean_tracing():
            exported: Any = export()
    except torch.onnx.OnnxExporterError:  # an operator that is in none of its tables
        del vars(program)["run_decompositions"]
        exported = export()  # traced again, for which guards of sizes need their Python
    model: ir.Model = exported.model
    return model
