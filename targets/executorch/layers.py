"""Layers that are alike are lowered once: XNNPACK's part of one of them, its weights exchanged, is that of the others.

A delegate names each weight by a hash of its bytes, and a program stores what is named. So the part of another layer
is the same bytes with other names in them, of the same length.
"""

import hashlib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from executorch.backends.transforms.utils import create_constant_placeholder, delete_constant_placeholder
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from ...runtime.errors import CheckFailed
from ..forms import TorchForm, TorchLayer
from .lowering import Region, lower

__all__ = ["lower_form"]

KEY = re.compile(rb"[0-9a-f]{64}")
"""A weight's name in a delegate, or the end of it."""


def lower_form(form: TorchForm, regions: Mapping[int, Region]) -> ExportedProgram:
    """Lower a program to XNNPACK, each kind of its layers once.

    Args:
        form: the program.
        regions: what is written of each weight, by its offset in the file.
    """
    if not form.layers:
        return lower(form.name, form.program)
    templates = [_Template.of(layer, regions) for layer in form.layers]
    lowered = lower(form.name, form.program, [torch.ops.pyrexport.layer.default])
    graph, names = lowered.graph, dict(lowered.graph_signature.inputs_to_parameters)
    first = sum(node.target is executorch_call_delegate for node in graph.nodes)
    for number, node in enumerate([node for node in graph.nodes if _is_call(node)]):
        kind, inputs, weights = node.args
        found = [regions[form.placements[names[weight.name]].offset] for weight in weights]
        template = templates[kind]
        module = template.with_weights(dict(zip(template.layer.parameters, found, strict=True)))
        arguments = template.arguments_of(lowered, kind, inputs, weights)
        _replace(lowered, node, f"lowered_module_{first + number}", module, arguments)
    for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        if node.name in names:
            delete_constant_placeholder(lowered, node)
    lowered.graph_module.recompile()
    return lowered


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "_op", None) is torch.ops.pyrexport.layer.default


def _replace(
    program: ExportedProgram, node: Node, name: str, module: LoweredBackendModule, arguments: list[Node]
) -> None:
    """Put a delegate in the place of a call of a layer."""
    graph = program.graph
    program.graph_module.add_module(name, module)
    with graph.inserting_before(node):
        attribute = graph.get_attr(name)
        call = graph.call_function(executorch_call_delegate, (attribute, *arguments))
        call.meta["val"] = [node.meta["val"]]
        output = graph.call_function(operator.getitem, (call, 0))
        output.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(output)
    graph.erase_node(node)


@dataclass(frozen=True)
class _Template:
    """A layer, lowered."""

    layer: TorchLayer
    program: ExportedProgram
    module: LoweredBackendModule
    arguments: tuple[str, ...]
    """What its delegate takes, by the names of the program's placeholders."""
    keys: Mapping[str, str]
    """The name in its delegate of each weight that this holds, by the weight's own name: a prefix and a hash."""

    @classmethod
    def of(cls, layer: TorchLayer, regions: Mapping[int, Region]) -> "_Template":
        """Lower the layer.

        Raises:
            CheckFailed: XNNPACK holds a weight as other than it is stored.
        """
        keys = _made_unique(layer, {name: regions[place.offset].key for name, place in layer.placements.items()})
        program = lower("layer", layer.program)
        (call,) = (node for node in program.graph.nodes if node.target is executorch_call_delegate)
        module: Any = program.graph_module.get_submodule(call.args[0].target)
        arguments = tuple(node.name for node in call.args[1:])
        taken = {program.graph_signature.inputs_to_parameters.get(name) for name in arguments}
        stored = {key[-64:]: key for key in module.named_data_store_output.pte_data}
        held = {name: stored[key] for name, key in keys.items() if key in stored}
        if missing := sorted(set(layer.parameters) - taken - held.keys()):
            raise CheckFailed(f"XNNPACK holds '{missing[0]}' in a form of its own: blocks cannot be lowered as one")
        return cls(layer, program, module, arguments, held)

    def with_weights(self, regions: Mapping[str, Region]) -> LoweredBackendModule:
        """The delegate of a layer with other weights, by their names."""
        names = {key[-64:].encode(): regions[name].key.encode() for name, key in self.keys.items()}
        own = {key: regions[name] for name, key in self.keys.items()}
        data, entries, buffers = self.module.named_data_store_output, dict[str, Any](), list[Any]()
        for key, entry in data.pte_data.items():
            region = own.get(key)
            entries[key if region is None else key[:-64] + region.key] = replace(entry, buffer_index=len(buffers))
            buffers.append(data.buffers[entry.buffer_index] if region is None else region)
        made = LoweredBackendModule(
            edge_program=self.module.original_module,
            backend_id=self.module.backend_id,
            processed_bytes=KEY.sub(lambda match: names.get(match[0], match[0]), bytes(self.module.processed_bytes)),
            compile_specs=self.module.compile_specs,
            named_data_store_output=NamedDataStoreOutput(buffers, entries, {}),
        )
        made.meta = self.module.meta
        return made

    def arguments_of(self, program: ExportedProgram, kind: int, inputs: list[Node], weights: list[Node]) -> list[Node]:
        """What the delegate is given in a program: the inputs and weights of a call, and the layer's own constants."""
        signature = self.program.graph_signature
        by_name = dict(zip(signature.user_inputs, inputs, strict=True))
        by_weight = dict(zip(self.layer.parameters, weights, strict=True))
        by_name |= {name: by_weight[weight] for name, weight in signature.inputs_to_parameters.items()}
        return [by_name.get(name) or self._constant(program, kind, name) for name in self.arguments]

    def _constant(self, program: ExportedProgram, kind: int, name: str) -> Node:
        """A constant of the layer as one of the program."""
        signature = self.program.graph_signature
        own = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}[name]
        values = self.program.constants.get(own, self.program.state_dict.get(own))
        graph: Graph = program.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            node: Node = create_constant_placeholder(
                program, graph, f"layer_{kind}_{name}", InputKind.CONSTANT_TENSOR, values
            )
        return node


def _made_unique(layer: TorchLayer, keys: Mapping[str, str]) -> dict[str, str]:
    """The names of a layer's weights, once no two are alike: vectors may all be ones, or a matrix be there twice.

    Those that could be get other values, which never leave the template; scales have to be positive.
    """
    unique, draw = dict[str, str](), torch.Generator().manual_seed(0)
    for name, key in keys.items():
        weight = layer.program.state_dict[name]
        if weight.ndim == 1 or key in unique.values():
            own = torch.empty(weight.shape, dtype=weight.dtype)
            own = own.uniform_(0.5, 1, generator=draw) if own.is_floating_point() else own.random_(generator=draw)
            layer.program.state_dict[name] = torch.nn.Parameter(own, requires_grad=False)
            key = hashlib.sha256(own.view(torch.uint8).numpy().tobytes()).hexdigest()
        unique[name] = key
    return unique
