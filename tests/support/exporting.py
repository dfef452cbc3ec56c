"""Programs that many tests build are translated to ONNX once in a process: a translation is most of a tiny build."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

import onnx_ir as ir
import torch
from pyrexport.export.lowering import onnx

__all__ = ["translate", "translate_once"]

translate = onnx._translate
"""The exporter's own, which translates each time."""


def translate_once() -> None:
    """Replace the translation of a program by one that remembers what it has made of the same program."""
    known: dict[str, ir.Model] = {}

    def once(program: Any, *how: Any) -> ir.Model:
        inputs, outputs, dialect, operators = how
        facts = [*_facts(program), list(inputs), list(outputs), dialect.opset, *_operators(operators)]
        key = hashlib.sha256(repr(facts).encode()).hexdigest()
        if key not in known:
            known[key] = translate(program, *how)
        return _cloned(known[key])

    onnx._translate = once


def _facts(program: Any) -> Iterator[object]:
    """All that a translation reads: the traced graph with its shapes and the values of its constants."""
    yield program.graph_signature
    yield program.range_constraints
    for node in program.graph.nodes:
        yield node.name, node.op, str(node.target), node.args, node.kwargs, _described(node.meta.get("val"))
    for name, value in program.state_dict.items():
        yield name, _described(value)
    for name, value in program.constants.items():
        yield (
            name,
            _described(value),
            hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy()).hexdigest(),
        )


def _described(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, [str(size) for size in value.shape], [str(step) for step in value.stride()]
    return [_described(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def _operators(operators: Mapping[Any, Callable[..., Any]]) -> Iterator[object]:
    for name, function in operators.items():
        yield str(name), _function(function)


def _function(function: Any) -> object:
    """Which function it is, and what it encloses; one that is made for so many kinds of layers, a list of them."""
    if isinstance(function, list):
        return len(function)
    if not hasattr(function, "__qualname__"):
        return repr(function)
    enclosed = [_function(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    return function.__module__, function.__qualname__, enclosed


def _cloned(model: ir.Model) -> ir.Model:
    """A clone shares the types of values with its model, and some passes change these where they lie."""
    clone = model.clone()
    for graph in (clone.graph, *(function.graph for function in clone.functions.values())):
        values = [*graph.inputs, *graph.initializers.values()]
        for value in (*values, *(value for node in graph.all_nodes() for value in node.outputs)):
            value.type = copy(value.type)
    return clone
