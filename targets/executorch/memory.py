"""What a method will need in memory, before it is lowered.

Shapes are fixed, so that XNNPACK's plan can be followed on paper: intermediate values lie in one workspace, the largest
first, each in the smallest gap that is free while it lives; views and elementwise operators take their input's place
where it is not needed again. What passes between delegates lies in ExecuTorch's own arena, planned alike. Weights are
packed, once. Convolutions keep tables of pointers, which outgrow all else where there are hundreds of them.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ...runtime.bundle.graphs import TensorSpec
from ...runtime.dtypes import DTYPES
from ..forms import TorchForm

__all__ = ["peak_bytes"]

VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "to", "getitem"}
POINTER = 8
"""Bytes of a pointer."""
IN_PLACE = {"add", "sub", "mul", "div", "neg", "sigmoid", "silu", "tanh", "exp", "sqrt", "rsqrt", "softmax", "clamp"}


def peak_bytes(form: TorchForm) -> int:
    """Peak of the anonymous memory that a run of a method takes, in bytes: weights, inputs and outputs included."""
    (graph,) = form.graphs
    weights = {place.offset: place.nbytes for place in form.placements.values()}
    held = sum(weights.values()) + sum(map(_nbytes, (*graph.inputs, *graph.outputs))) + _pointers(form.program)
    calls = [index for index, node in enumerate(form.program.graph.nodes) if "pyrexport.layer" in str(node.target)]
    if not calls:
        return held + _arena(_local(form.program))
    before, between, after = _around(_local(form.program), calls[0], calls[-1])
    layers = max(_arena(_local(layer.program)) for layer in form.layers)
    return held + _arena(between) + _grown((_arena(before), layers, _arena(after)))


def _grown(sizes: Iterable[int]) -> int:
    """Peak of a workspace that delegates share: where it grows, the old one is freed when the new one is there."""
    held = peak = 0
    for size in sizes:
        if size > held:
            held, peak = size, max(peak, held + size)
    return peak


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].nbytes


def _pointers(program: ExportedProgram) -> int:
    """Bytes of the tables of pointers that XNNPACK keeps for each convolution: one for each output pixel and tap."""
    total = 0
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        taps, pixels = (math.prod(value.shape[2:]) for value in (node.args[1].meta["val"], node.meta["val"]))
        total += pixels * taps * POINTER if taps > 1 else 0
    return total


@dataclass
class _Value:
    """What lies in the arena, from the node that makes it to the last one that uses it."""

    size: int
    first: int
    last: int
    at: int = 0

    def meets(self, other: "_Value") -> bool:
        """Whether both live at some time."""
        return self.first <= other.last and other.first <= self.last


def _local(program: ExportedProgram) -> list[_Value]:
    """A program's intermediate values; its outputs are its caller's."""
    outputs = set(program.graph.output_node().args[0])
    return [value for node, value in _values(program).items() if node not in outputs]


def _around(values: Sequence[_Value], first: int, last: int) -> tuple[list[_Value], list[_Value], list[_Value]]:
    """Values that live before the layers, that are handed from delegate to delegate, and that live after the layers."""
    before = [value for value in values if value.last < first]
    after = [value for value in values if value.first > last]
    return before, [value for value in values if value.last >= first and value.first <= last], after


def _arena(values: Sequence[_Value]) -> int:
    """Bytes of values, each of which has its place while it lives."""
    placed: list[_Value] = []
    for value in sorted(values, key=lambda each: -each.size):
        value.at = _gap(value.size, sorted((each for each in placed if each.meets(value)), key=lambda each: each.at))
        placed.append(value)
    return max((value.at + value.size for value in placed), default=0)


def _gap(size: int, others: Iterable[_Value]) -> int:
    """The start of the smallest gap between values that holds a size, or the end of them all."""
    gaps, end = [], 0
    for other in others:
        if other.at - end >= size:
            gaps.append((other.at - end, end))
        end = max(end, other.at + other.size)
    return min(gaps)[1] if gaps else end


def _values(program: ExportedProgram) -> dict[Node, _Value]:
    """What each node makes that depends on the inputs and takes no other's place."""
    nodes: Sequence[Node] = list(program.graph.nodes)
    known = {node for node in nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs}
    last = {used: index for index, node in enumerate(nodes) for used in node.all_input_nodes}
    values: dict[Node, _Value] = {}
    place: dict[Node, Node] = {}
    for index, node in enumerate(nodes):
        given = [each for each in node.all_input_nodes if each in known]
        if node.op != "call_function" or not given:
            continue
        known.add(node)
        size, until = _size(node.meta["val"]), last.get(node, index)
        shared = _shared(node, index, given, size, values, place, last)
        if shared is None:
            place[node], values[node] = node, _Value(size, index, until)
        else:
            place[node] = shared
            values[shared].last = max(values[shared].last, until)
    return values


def _shared(
    node: Node,
    index: int,
    given: Sequence[Node],
    size: int,
    values: dict[Node, _Value],
    place: dict[Node, Node],
    last: dict[Node, int],
) -> Node | None:
    """Whose place a node's value takes."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    owners = [place[each] for each in given if each in place]
    if name in VIEWS or node.target is operator.getitem:
        return owners[0] if owners else None
    free = [owner for owner in owners if values[owner].last <= index and values[owner].size == size]
    return free[0] if name in IN_PLACE and free else None


def _size(value: Any) -> int:
    """Bytes of a node's value, rounded up as arenas align it."""
    if isinstance(value, torch.Tensor):
        return -(-value.numel() * value.element_size() // 64) * 64
    return sum(map(_size, value or ()))
