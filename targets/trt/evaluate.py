"""The networks of engines, made evaluable on a machine without their device."""

import onnx_ir as ir

__all__ = ["widen"]

SHORT = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def widen(model: ir.Model) -> None:
    """Turn a network of 16 bits into one of float32 that keeps the rounding of its weights.

    Activations are no longer rounded; attention becomes ONNX Runtime's own operator, which never holds the scores.
    """
    graph = model.graph
    outputs, inputs = set(graph.outputs), set(graph.inputs)
    rounded: list[ir.Value] = [value for value in graph.initializers.values() if value.dtype in SHORT]
    for node in graph:
        (first, *_), result = (*node.inputs, None), node.outputs[0]
        if node.op_type == "Cast" and result.dtype in SHORT and result not in outputs:
            if first is not None and first.is_initializer():
                rounded.append(result)
            else:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        if node.op_type == "Attention":
            heads = node.attributes["q_num_heads"].as_int()
            node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
            node.attributes.clear()
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
            model.opset_imports["com.microsoft"] = 1
    for node in graph:
        for value in node.outputs:
            if value.dtype in SHORT and value not in outputs and value not in inputs and value not in rounded:
                value.dtype = ir.DataType.FLOAT
    for value in rounded:
        _cast_back(graph, value)


def _cast_back(graph: ir.Graph, value: ir.Value) -> None:
    """Let all users of a 16-bit value read it as float32."""
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}_wide"
    cast.outputs[0].dtype = ir.DataType.FLOAT
    users = {use.node for use in uses}
    graph.insert_before(next(node for node in graph if node in users), cast)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
