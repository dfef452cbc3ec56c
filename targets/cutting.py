"""A network cut into several that run one after the other, so that the weights of each stay within a limit."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import onnx_ir as ir

from ..runtime.bundle.graphs import GraphSpec, TensorSpec
from ..runtime.errors import UsageError
from .forms import OnnxForm
from .parts import part_name
from .shapes import Shapes, shapes_of

__all__ = ["cut_network", "stored_bytes"]

ROUNDING = ("QuantizeLinear", "DequantizeLinear")
"""What is made again in each part that takes it: a product of 8 bits is one by what stands before it."""

_Nodes = dict[ir.Node, None]
"""A set that keeps the order."""


def stored_bytes(form: OnnxForm) -> int:
    """Bytes of a network's weights as they are placed, and of its constants."""
    return sum(_stored(form, value) for value in form.model.graph.initializers.values())


def cut_network(form: OnnxForm, limit: int, option: str | None = None) -> list[OnnxForm]:
    """Cut a network where least crosses, which is between the blocks of a transformer.

    What depends on no value of an input, such as rotary tables and sizes, is made again in each part that takes it.

    Args:
        form: the network.
        limit: most bytes of the weights of a part.
        option: what the limit was given by; None: nobody gave it, and a node whose weights are more may exceed it.

    Returns:
        Its parts in the order that they run in, each with its own weights and graphs; a weight that is taken in several
        places may be in several of them. A part takes inputs of the network and outputs of the parts before it, by the
        names that these have in the network.

    Raises:
        UsageError: the weights of a single node are more than was asked for.
    """
    if stored_bytes(form) <= limit:
        return [form]
    nodes, shapes = dict.fromkeys(_moving(form.model.graph)), shapes_of(form)
    ends = [0, *_ends(form, nodes, shapes, limit, option), len(nodes)]
    if len(ends) == 2:
        return [form]
    order = list(nodes)
    runs = [order[first:last] for first, last in pairwise(ends)]
    still = [value for value in form.model.graph.outputs if value.producer() not in nodes]
    asked = [*([] for _ in runs[1:]), still]  # the last part gives what depends on no input
    taken = [_taken(run, also, nodes) for run, also in zip(runs, asked, strict=True)]
    parts = []
    for index, (run, also) in enumerate(zip(runs, asked, strict=True)):
        crosses = {*form.model.graph.outputs, *chain.from_iterable(taken[index + 1 :])}
        given = [value for node in run for value in node.outputs if value in crosses]
        parts.append(_part(form, part_name(form.name, index), taken[index], [*given, *also], shapes))
    return parts


def _moving(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that depend on values of an input of the graph, in order, and are not made again."""
    values = set(graph.inputs)
    for node in graph:
        if node.op_type != "Shape" and any(value in values for value in node.inputs):
            values.update(node.outputs)
            if node.op_type not in ROUNDING:
                yield node


def _ends(form: OnnxForm, nodes: _Nodes, shapes: Sequence[Shapes], limit: int, option: str | None) -> Iterator[int]:
    """Where each part but the last one ends: at the narrowest place near an even share of what is left."""
    crossing, order, done = list(_crossing(form, nodes, shapes)), list(nodes), 0
    while (held := list(_held(form, nodes, order[done:])))[-1] > limit:
        count = math.ceil(held[-1] / limit)
        least, share = held[-1] - (count - 1) * limit, held[-1] / count
        seams = [(done + index, weights) for index, weights in enumerate(held, 1)]
        within = [seam for seam in seams if 0 < seam[1] <= limit]
        # Fewer would leave more than the others may take.
        near = [seam for seam in within if seam[1] >= max(least, share / 2)] or within[-1:]
        if option is not None and not near:
            raise UsageError(
                f"{form.graphs[0].name} cannot be cut into parts of at most {limit:,} bytes of weights: expected a "
                f"{option} of at least {next(filter(None, held)):,}, which one of its nodes takes"
            )
        if option is None and (not near or near[-1][1] < share / 2):
            over = next(weights for _, weights in seams if weights > limit)
            near = [seam for seam in seams if seam[1] == over]
            if near[-1][0] == len(order):
                return
        done, _ = min(near, key=lambda place: (crossing[place[0] - 1], abs(place[1] - share)))
        yield done


def _held(form: OnnxForm, nodes: _Nodes, order: Iterable[ir.Node]) -> Iterator[int]:
    """Bytes of the weights that a part of some nodes holds once each of them is in it."""
    weights, seen = 0, set[ir.Value]()
    for node in order:
        weights += sum(_stored(form, value) for value in _sources(node.inputs, nodes, seen) if not _is_made(value))
        yield weights


def _crossing(form: OnnxForm, nodes: _Nodes, shapes: Sequence[Shapes]) -> Iterator[int]:
    """Bytes of what the nodes after each one take of those up to it, and of the inputs, in all graphs."""
    taken = [[value for value in _sources(node.inputs, nodes, set()) if _is_made(value)] for node in nodes]
    last = {value: index for index, values in enumerate(taken) for value in values}
    crossing, ended = 0, [0] * len(nodes)
    for index, node in enumerate(nodes):
        for value in (*node.outputs, *(form.model.graph.inputs if index == 0 else ())):
            if value in last:
                crossing += _nbytes(value, shapes)
                ended[last[value]] += _nbytes(value, shapes)
        crossing -= ended[index]
        yield crossing


def _sources(given: Iterable[ir.Value | None], nodes: _Nodes, seen: set[ir.Value]) -> Iterator[ir.Value]:
    """Where values come from, through what is made again: initializers, inputs, and what nodes give; no seen ones."""
    waiting = [value for value in given if value is not None]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is None or producer in nodes:
            yield value
        else:
            waiting += [each for each in producer.inputs if each is not None]


def _is_made(value: ir.Value) -> bool:
    """Whether a value is made in a run, or given to it."""
    return value.is_graph_input() or value.producer() is not None


def _taken(run: Sequence[ir.Node], also: Sequence[ir.Value], nodes: _Nodes) -> list[ir.Value]:
    """What a part takes of the inputs and of the parts before it."""
    inside = set(run)
    given = [*(value for node in run for value in node.inputs), *also]
    found = [value for value in _sources(given, nodes, set()) if _is_made(value)]
    return [value for value in found if value.producer() not in inside]


def _part(
    form: OnnxForm, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], shapes: Sequence[Shapes]
) -> OnnxForm:
    graph = ir.convenience.extract(form.model.graph, inputs, outputs)
    placements = {weight: place for weight, place in form.placements.items() if weight in graph.initializers}
    graphs = tuple(
        GraphSpec(spec.key, _specs(inputs, found), _specs(outputs, found))
        for spec, found in zip(form.graphs, shapes, strict=True)
    )
    model = ir.Model(graph, ir_version=form.model.ir_version)
    return replace(form, name=name, model=model, placements=placements, graphs=graphs)


def _specs(values: Sequence[ir.Value], shapes: Shapes) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(str(value.name), shapes[str(value.name)], _dtype(value)) for value in values)


def _dtype(value: ir.Value) -> str:
    assert value.dtype is not None
    return str(value.dtype.numpy())


def _stored(form: OnnxForm, value: ir.Value) -> int:
    """Bytes of an initializer."""
    place = form.placements.get(str(value.name))
    if place is not None:
        return place.nbytes
    return 0 if value.const_value is None else value.const_value.nbytes


def _nbytes(value: ir.Value, shapes: Sequence[Shapes]) -> int:
    """Bytes of a value in all graphs."""
    assert value.dtype is not None
    return int(sum(math.prod(found[str(value.name)]) for found in shapes) * value.dtype.itemsize)
