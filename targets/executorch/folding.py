"""What depends on weights alone is computed before a program is lowered: XNNPACK takes constants as they are."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from executorch.backends.transforms.utils import (
    create_constant_placeholder,
    delete_constant_placeholder,
    get_param_tensor,
)
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

__all__ = ["fold"]


def fold(program: ExportedProgram, operators: Sequence[Any]) -> None:
    """Replace calls of operators, whose arguments are all weights, by constants; weights that only they read go."""
    read: dict[Node, None] = {}
    for node in [node for node in program.graph.nodes if node.op == "call_function" and node.target in operators]:
        values = node.target(*(get_param_tensor(program, each) for each in node.args))
        read |= dict.fromkeys(node.all_input_nodes)
        if isinstance(values, torch.Tensor):
            _replace(program, node, values)
            continue
        for output in list(node.users):
            if output.target is not operator.getitem:
                raise TypeError(f"{output} takes all outputs of {node}")
            _replace(program, output, values[output.args[1]])
        program.graph.erase_node(node)
    for node in read:
        if not node.users:
            delete_constant_placeholder(program, node)
    program.graph_module.recompile()


def _replace(program: ExportedProgram, node: Node, value: torch.Tensor) -> None:
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        constant = create_constant_placeholder(
            program, program.graph, f"folded_{node.name}", InputKind.PARAMETER, value
        )
    node.replace_all_uses_with(constant)
    program.graph.erase_node(node)
