"""A network cut into several that run one after the other, so that the weights of each stay within a limit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import onnx_ir as ir

from ...runtime.errors import UsageError
from ..forms import OnnxForm

__all__ = ["cut_network", "stored_bytes"]

_Nodes = dict[ir.Node, None]
"""A set that keeps the order."""


@dataclass(frozen=True)
class _Seam:
    """A place between two nodes."""

    before: int
    """How many of the nodes lie before it."""
    weights: int
    """Bytes of the weights that these take."""
    crossing: int
    """Bytes of what the nodes after it take of those before, and of the inputs."""


def stored_bytes(form: OnnxForm) -> int:
    """Bytes of a network's weights as they are placed, and of its constants."""
    return sum(_stored(form, value) for value in form.model.graph.initializers.values())


def cut_network(form: OnnxForm, limit: int) -> list[OnnxForm]:
    """Cut a network where least crosses, which is between the blocks of a transformer.

    What depends on no input, such as rotary tables, is made again in each part that takes it.

    Args:
        form: the network.
        limit: most bytes of the weights of a part.

    Returns:
        Its parts in the order that they run in, each with its own weights. A part takes inputs of the network and
        outputs of the parts before it, by the names that these have in the network.

    Raises:
        UsageError: the weights of a single node are more.
    """
    nodes = dict.fromkeys(_moving(form.model.graph))
    ends = [0, *_ends(form, nodes, limit), len(nodes)]
    if len(ends) == 2:
        return [form]
    order = list(nodes)
    return [_part(form, nodes, order[first:last]) for first, last in pairwise(ends)]


def _moving(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that depend on an input of the graph, in order."""
    values = set(graph.inputs)
    for node in graph:
        if any(value in values for value in node.inputs):
            values.update(node.outputs)
            yield node


def _ends(form: OnnxForm, nodes: _Nodes, limit: int) -> Iterator[int]:
    """Where each part but the last one ends: at the narrowest place near an even share of what is left."""
    seams, done = list(_seams(form, nodes)), 0
    while (left := seams[-1].weights - done) > limit:
        count = math.ceil(left / limit)
        least, share = left - (count - 1) * limit, left / count
        within = [seam for seam in seams if 0 < seam.weights - done <= limit]
        if not within:
            most = next(seam.weights for seam in seams if seam.weights > done) - done
            raise UsageError(
                f"{form.graphs[0].name} cannot be cut into contexts of at most {limit:,} bytes of weights: expected a "
                f"--context-limit of at least {most:,}, which one of its nodes takes"
            )
        # Fewer would leave more than the others may take.
        near = [seam for seam in within if seam.weights - done >= max(least, share / 2)] or within[-1:]
        seam = min(near, key=lambda seam: (seam.crossing, abs(seam.weights - done - share)))
        yield seam.before
        done = seam.weights


def _seams(form: OnnxForm, nodes: _Nodes) -> Iterator[_Seam]:
    """The place after each node."""
    last = {value: index for index, node in enumerate(nodes) for value in node.inputs}
    weights, seen = 0, set[ir.Value]()
    crossing, ended = 0, [0] * len(nodes)
    for index, node in enumerate(nodes):
        weights += sum(_stored(form, value) for value in _constants(node, nodes, seen))
        for value in (*node.outputs, *(form.model.graph.inputs if index == 0 else ())):
            if value in last:
                crossing += _nbytes(value)
                ended[last[value]] += _nbytes(value)
        crossing -= ended[index]
        yield _Seam(index + 1, weights, crossing)


def _constants(node: ir.Node, nodes: _Nodes, seen: set[ir.Value]) -> Iterator[ir.Value]:
    """Initializers that a node takes, itself or through what depends on no input, and that none before it took."""
    waiting = [value for value in node.inputs if value is not None]
    while waiting:
        value = waiting.pop()
        if value in seen or value.is_graph_input() or value.producer() in nodes:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is None:
            yield value
        else:
            waiting += [each for each in producer.inputs if each is not None]


def _part(form: OnnxForm, nodes: _Nodes, own: Sequence[ir.Node]) -> OnnxForm:
    inside = set(own)
    taken = [value for node in own for value in node.inputs if value is not None and value.producer() not in inside]
    inputs = [value for value in taken if value.is_graph_input() or value.producer() in nodes]
    given = [value for node in own for value in node.outputs]
    outputs = [value for value in given if value.is_graph_output() or not inside.issuperset(value.consumers())]
    if own[-1] is next(reversed(nodes)):  # the last part gives what depends on no input
        outputs += [value for value in form.model.graph.outputs if value.producer() not in nodes]
    graph = ir.convenience.extract(form.model.graph, list(dict.fromkeys(inputs)), outputs)
    placements = {name: place for name, place in form.placements.items() if name in graph.initializers}
    return replace(form, model=ir.Model(graph, ir_version=form.model.ir_version), placements=placements)


def _stored(form: OnnxForm, value: ir.Value) -> int:
    """Bytes of an initializer."""
    place = form.placements.get(str(value.name))
    if place is not None:
        return place.nbytes
    return 0 if value.const_value is None else value.const_value.nbytes


def _nbytes(value: ir.Value) -> int:
    """Bytes of a value of fixed shape."""
    assert value.shape is not None
    assert value.dtype is not None
    return int(math.prod(value.shape.numpy()) * value.dtype.itemsize)
