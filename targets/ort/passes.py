"""What ONNX Runtime's order of evaluation asks of a graph."""

import onnx_ir as ir

__all__ = ["expand_late"]


def expand_late(graph: ir.Graph) -> None:
    """Put the casts of 16-bit weights first: of two inputs ONNX Runtime evaluates the one that stands later first.

    Where they stand beside their products, all weights are expanded before the first block is evaluated.
    """
    casts = [node for node in graph if node.op_type == "Cast" and node.inputs[0] and node.inputs[0].is_initializer()]
    if casts:
        graph.remove(casts)
        graph.insert_before(graph[0], casts)
