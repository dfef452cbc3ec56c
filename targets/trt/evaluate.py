"""The networks of engines, made evaluable on a machine without their device."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["widen"]

SHORT = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
BYTES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
"""What rounds nothing: its outputs are values of its inputs."""


def widen(model: ir.Model) -> None:
    """Turn a network of 8 and 16 bits into one of float32 that rounds what the engine rounds.

    Every value that is of 16 bits in the network is rounded to them and goes on in float32; attention becomes ONNX
    Runtime's own operator, which never holds the scores. What is rounded to 8 bits is so by float32 arithmetic:
    ONNX Runtime would join it and a product to one of its own integers, whose sums are cut on some machines.
    """
    graph = model.graph
    for value in [value for value in graph.initializers.values() if value.dtype in SHORT]:
        _cast_back(graph, value)
    outputs, weights = set(graph.outputs), {v for v in graph.initializers.values() if v.dtype in BYTES}
    for node in list(graph):
        if node.graph is None:
            continue  # was removed
        if node.op_type == "QuantizeLinear":
            _round_in_floats(graph, node)
            continue
        if node.op_type == "DequantizeLinear" and node.inputs[0] in weights:
            _expand_in_floats(graph, node)
            continue
        if node.op_type == "Attention":
            _replace_attention(model, node)
        for value in node.outputs:
            if value.dtype in SHORT and value not in outputs:
                _round(graph, node, value)


def _replace_attention(model: ir.Model, node: ir.Node) -> None:
    heads = node.attributes["q_num_heads"].as_int()
    node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
    node.attributes.clear()
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
    model.opset_imports["com.microsoft"] = 1


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let a value of 16 bits be computed in float32, and rounded where the engine would round it."""
    if node.op_type == "Cast":
        _cast_back(graph, value)
        return
    dtype, value.dtype = value.dtype, ir.DataType.FLOAT
    if node.op_type in MOVES:
        return
    uses = list(value.uses())
    short = _after(graph, node, "Cast", [value], "short", dtype, {"to": dtype})
    wide = _after(graph, _producer(short), "Cast", [short], "rounded", ir.DataType.FLOAT, {"to": ir.DataType.FLOAT})
    _use(wide, uses)


def _expand_in_floats(graph: ir.Graph, node: ir.Node) -> None:
    """Let a weight of 8 bits be float32, not rounded again: its scales multiply the sums of a product."""
    values, scale, *_ = node.inputs
    assert values is not None
    assert scale is not None
    wide = _after(graph, node, "Cast", [values], "values", ir.DataType.FLOAT, {"to": ir.DataType.FLOAT})
    weight = _after(graph, _producer(wide), "Mul", [wide, scale], "weight", ir.DataType.FLOAT)
    _use(weight, list(node.outputs[0].uses()))
    graph.remove(node, safe=True)


def _round_in_floats(graph: ir.Graph, node: ir.Node) -> None:
    """Let a value be rounded to 8 bits and back without integers."""
    x, scale, zero = node.inputs
    (values,) = node.outputs
    assert x is not None
    assert scale is not None
    assert zero is not None
    steps = _after(graph, node, "Div", [x, scale], "steps", ir.DataType.FLOAT)
    if zero.dtype == ir.DataType.INT8:
        rounded = _after(graph, _producer(steps), "Round", [steps], "rounded", ir.DataType.FLOAT)
        held = _clipped(graph, rounded, -128, 127)
    else:
        clipped = _clipped(graph, steps, -448, 448)
        short = _after(graph, _producer(clipped), "Cast", [clipped], "short", zero.dtype, {"to": zero.dtype})
        held = _after(graph, _producer(short), "Cast", [short], "held", ir.DataType.FLOAT, {"to": ir.DataType.FLOAT})
    back = _after(graph, _producer(held), "Mul", [held, scale], "back", ir.DataType.FLOAT)
    for expanded in [use.node for use in values.uses()]:
        _use(back, list(expanded.outputs[0].uses()))
        graph.remove(expanded, safe=True)
    graph.remove(node, safe=True)


def _clipped(graph: ir.Graph, value: ir.Value, low: float, high: float) -> ir.Value:
    ends = []
    for name, end in (("low", low), ("high", high)):
        constant = ir.Value(name=f"{value.name}_{name}", const_value=ir.tensor(np.float32(end)))
        constant.dtype, constant.shape = ir.DataType.FLOAT, ir.Shape(())
        graph.register_initializer(constant)
        ends.append(constant)
    return _after(graph, _producer(value), "Clip", [value, *ends], "clipped", ir.DataType.FLOAT)


def _after(
    graph: ir.Graph,
    node: ir.Node,
    kind: str,
    inputs: Iterable[ir.Value],
    name: str,
    dtype: Any,
    attributes: dict[str, Any] | None = None,
) -> ir.Value:
    """The output of a new node behind another one."""
    made = ir.node(kind, list(inputs), attributes=attributes or {})
    out: ir.Value = made.outputs[0]
    out.name, out.dtype = f"{node.outputs[0].name}_{name}", dtype
    graph.insert_after(node, made)
    return out


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _use(value: ir.Value, uses: Iterable[Any]) -> None:
    for use in uses:
        use.node.replace_input_with(use.idx, value)


def _cast_back(graph: ir.Graph, value: ir.Value) -> None:
    """Let all users of a 16-bit value read it as float32."""
    uses = list(value.uses())
    if not uses:
        return
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}_wide"
    cast.outputs[0].dtype = ir.DataType.FLOAT
    users = {use.node for use in uses}
    graph.insert_before(next(node for node in graph if node in users), cast)
    _use(cast.outputs[0], uses)
