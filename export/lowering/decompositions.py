"""Decompositions in the graph of a program, in place of those for which PyTorch's exporter has it traced once more.

`torch.onnx.export` has every program traced a second time, which takes longer than all else that it does, to be rid of
what it cannot translate. In graphs like ours that is little, and what becomes of it is known.
"""

from collections.abc import Container
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["decompose"]

aten = torch.ops.aten
COPIES = (aten.detach_.default, aten.lift_fresh_copy.default)
"""What constants that a module makes go through."""
SHAPED = (aten.flatten.using_ints, aten.reshape.default, aten.unflatten.int)


def decompose(program: ExportedProgram) -> None:
    """Decompose a program's operators where they stand; asked by the exporter to be traced again, it returns itself.

    It is traced all the same where it has an operator that changes what it is given, or one of the exporter's table.
    """
    for node in [node for node in program.graph.nodes if node.op == "call_function"]:
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = _decomposed(node)

    def decomposed(table: Container[Any]) -> ExportedProgram:
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        if any(target in table or _changes(target) for target in targets):
            return ExportedProgram.run_decompositions(program, table)
        return program

    vars(program)["run_decompositions"] = decomposed


def _decomposed(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a node becomes: an operator, its arguments, those by name."""
    target, args = node.target, node.args
    if target is aten.to.dtype:
        dtype = node.meta["val"].dtype
        same = node.all_input_nodes[0].meta["val"].dtype == dtype
        return (aten.clone.default, args[:1], {}) if same else (aten._to_copy.default, args[:1], {"dtype": dtype})
    if target in COPIES:
        return aten.clone.default, args[:1], {}
    if target in SHAPED and all(isinstance(size, int) for size in node.meta["val"].shape):
        return aten.reshape.default, (args[0], list(node.meta["val"].shape)), {}
    if target is aten.rsub.Scalar and len(args) == 2 and not node.kwargs:
        return aten.sub.Tensor, args[::-1], {}
    return target, args, dict(node.kwargs)


def _changes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable
