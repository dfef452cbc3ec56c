"""What a graph will need in memory, before anything runs.

Shapes are fixed and the order of evaluation is known, so that a run of ONNX Runtime's CPU provider can be followed
on paper: views and in-place operators take nothing, and a buffer is handed on to tensors of the same shape. Weights are
mapped from the file and don't count.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

__all__ = ["peak_bytes"]

VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"}
IN_PLACE = {"Clip", "Relu", "Sigmoid", "Softmax", "Tanh"}
"""Operators that write over their input. Runs show that sums and products of tokens do not."""
FUSED_IN_FRAMES = {"Add", "Div", "Mul", "Neg", "Reciprocal", "Sqrt", "Sub"}
"""Operators that take nothing beside a convolution, or nearly so, since they become part of it."""


def peak_bytes(model: ir.Model) -> int:
    """Peak of the memory that a run of a graph takes, its inputs and outputs included, weights excluded.

    Args:
        model: with fixed shapes; the order of evaluation is ONNX Runtime's, depth first from the outputs.
    """
    order = _order(model.graph)
    lives = _buffers(order, model.graph)
    change = [0] * (len(order) + 1)
    for life in lives:
        change[life.first] += life.size
        change[life.last + 1] -= life.size
    inputs = sum(_nbytes(value) for value in model.graph.inputs)
    held = accumulate(change[:-1])
    return inputs + max(now + _workspace(node) for now, node in zip(held, order, strict=True))


@dataclass
class _Buffer:
    """What tensors of one shape live in, one after another, from the first one's node to the last one's last use."""

    size: int
    first: int
    last: int


def _buffers(order: list[ir.Node], graph: ir.Graph) -> list[_Buffer]:
    """ONNX Runtime's plan: a tensor takes the buffer of one of the same shape that is done with, or a new one."""
    owners = _owners(order)
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(order):
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                last[owners.get(value, value)] = index
    for output in graph.outputs:
        last[owners.get(output, output)] = len(order) - 1
    buffers: list[_Buffer] = []
    of: dict[ir.Value, _Buffer] = {}
    free: dict[tuple[int, ...], list[_Buffer]] = {}
    for index, node in enumerate(order):
        for output in node.outputs:
            if output in owners:
                continue
            buffer = _in_place(node, index, output, of, last, owners)
            if buffer is None:
                waiting = free.get(_shape(output))
                buffer = waiting.pop() if waiting else None
            if buffer is None:
                buffer = _Buffer(_nbytes(output), index, index)
                buffers.append(buffer)
            of[output] = buffer
            buffer.last = last[output]
        done = {owners.get(value, value) for value in (*node.inputs, *node.outputs) if value is not None}
        for value in done & of.keys():
            # A buffer that went on to another tensor in place is that one's to free.
            if last[value] == index and of[value].last == index:
                free.setdefault(_shape(value), []).append(of[value])
    return buffers


def _in_place(
    node: ir.Node,
    index: int,
    output: ir.Value,
    of: dict[ir.Value, _Buffer],
    last: dict[ir.Value, int],
    owners: dict[ir.Value, ir.Value],
) -> _Buffer | None:
    """The buffer of an input that ends here, where the operator can write over it."""
    if node.op_type not in IN_PLACE and not (node.op_type in FUSED_IN_FRAMES and len(output.shape or ()) >= 4):
        return None
    for value in node.inputs[:2]:
        owner = owners.get(value, value) if value is not None else None
        if owner in of and last[owner] == index and _shape(owner) == _shape(output):
            return of[owner]
    return None


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or value.dtype is None:
        raise ValueError(f"value {value.name} has no fixed shape")
    return (*(int(n) for n in value.shape.numpy()), math.ceil(value.dtype.itemsize))


def _nbytes(value: ir.Value) -> int:
    return math.prod(_shape(value))


def _order(graph: ir.Graph) -> list[ir.Node]:
    """Depth first from the outputs, the later of two inputs' nodes first, as ONNX Runtime orders them."""
    position = {node: index for index, node in enumerate(graph)}
    stack = [(node, False) for node in graph if not any(output.uses() for output in node.outputs)]
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        before = {value.producer() for value in node.inputs if value is not None}
        stack.extend((n, False) for n in sorted((n for n in before if n), key=lambda n: position[n]) if n not in seen)
    return order


def _owners(order: list[ir.Node]) -> dict[ir.Value, ir.Value]:
    """Whose memory a view, or a product that its bias is added to, lives in."""
    owners: dict[ir.Value, ir.Value] = {}
    for node in order:
        if (node.op_type in VIEWS or _fused(node)) and node.inputs[0] is not None:
            owners[node.outputs[0]] = owners.get(node.inputs[0], node.inputs[0])
    return owners


def _fused(node: ir.Node) -> bool:
    """A bias that becomes part of the matrix product before it."""
    before = node.inputs[0].producer() if node.op_type == "Add" and node.inputs[0] is not None else None
    return before is not None and before.op_type == "MatMul" and len(list(before.outputs[0].uses())) == 1


def _workspace(node: ir.Node) -> int:
    """What an operator takes beside its outputs while it runs."""
    if node.op_type == "MultiHeadAttention":  # query, key and value, one head after the other
        return sum(_nbytes(value) for value in node.inputs[:3] if value is not None)
    if node.op_type == "MatMulNBits":  # the matrix in float32
        return 4 * node.attributes["K"].as_int() * node.attributes["N"].as_int()
    return 0
