"""What crosses between engines as one matrix: TensorRT orders the outputs of an engine by chance."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ...runtime.bundle.graphs import GraphSpec, TensorSpec
from ...runtime.dtypes import DTYPES, WEIGHT_DTYPES
from ..forms import OnnxForm
from ..parts import part_name

__all__ = ["pack_crossings"]


@dataclass(frozen=True)
class _Tensor:
    """A value that crosses, and its shape in each graph."""

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def target(self) -> list[int]:
        """Its shape, -1 where graphs differ."""
        return [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*self.shapes, strict=True)]

    @property
    def ragged(self) -> bool:
        """Whether graphs differ."""
        return -1 in self.target

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows it has in each graph, as a matrix: the size that differs; else 1."""
        return tuple(shape[self.target.index(-1)] if self.ragged else 1 for shape in self.shapes)

    @property
    def width(self) -> int:
        """Values of a row."""
        return math.prod(self.shapes[0]) // self.rows[0]

    @property
    def packable(self) -> bool:
        """Whether it is of floating-point values, and a matrix of rows."""
        target = self.target
        before = target[: target.index(-1)] if self.ragged else []
        return self.dtype in WEIGHT_DTYPES and target.count(-1) <= 1 and math.prod(before) == 1


@dataclass(frozen=True)
class _Pack:
    """A matrix whose rows are those of several values side by side."""

    name: str
    tensors: tuple[_Tensor, ...]

    @property
    def names(self) -> list[str]:
        """What is in it."""
        return [tensor.name for tensor in self.tensors]

    @property
    def dtype(self) -> str:
        """That of the values if they have one; else float32, which holds those of 16 bits exactly."""
        found = {tensor.dtype for tensor in self.tensors}
        return found.pop() if len(found) == 1 else "float32"

    @property
    def width(self) -> int:
        """Values of a row."""
        return sum(tensor.width for tensor in self.tensors)

    def spec(self, graph: int) -> TensorSpec:
        """It, in a graph."""
        return TensorSpec(self.name, (self.tensors[0].rows[graph], self.width), self.dtype)

    def value(self) -> ir.Value:
        """It, as a network's input or output."""
        rows = None if self.tensors[0].ragged else 1
        return ir.Value(name=self.name, shape=ir.Shape([rows, self.width]), type=ir.TensorType(_kind(self.dtype)))


def pack_crossings(parts: Sequence[OnnxForm], kept: Collection[str]) -> list[OnnxForm]:
    """Let each part give one matrix, and those that take any of what it held take that: two builds give the same bytes.

    A part that gives values of one size and values of many is two parts: cut from one tensor, they would need sizes of
    pieces in the run, which TensorRT orders by chance too, as it does where sizes have names. What is no floating-point
    value, or differs between graphs in more than the number of its rows, crosses as it is.

    Args:
        parts: of a network, in the order that they run in; their networks are changed.
        kept: outputs of the network, which stay what they are.

    Returns:
        The parts, as their networks are now.
    """
    if len(parts) == 1:
        return list(parts)
    apart = [*chain.from_iterable(_apart(part, kept) for part in parts[:-1]), parts[-1]]
    packs: list[_Pack] = []
    found = []
    for number, part in enumerate(apart):
        asked = {tensor.name for tensor in part.graphs[0].inputs}
        taken = [pack for pack in packs if asked.intersection(pack.names)]
        made = [] if part is parts[-1] else _packs_of(part, kept, part_name("crossing", number))
        for pack in reversed(taken):
            _read(part.model.graph, pack)
        for value in part.model.graph.inputs:
            value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape or ()])
        for pack in made:
            _write(part.model.graph, pack)
        packs += made
        graphs = (
            GraphSpec(spec.key, _replaced(spec.inputs, taken, index), _replaced(spec.outputs, made, index))
            for index, spec in enumerate(part.graphs)
        )
        found.append(replace(part, name=part_name(parts[0].name, number), graphs=tuple(graphs)))
    return found


def _apart(part: OnnxForm, kept: Collection[str]) -> Iterator[OnnxForm]:
    """A part; or what makes its values of one size, and what makes the others from these."""
    tensors = _outputs(part)
    fixed = [tensor.name for tensor in tensors if not tensor.ragged]
    ragged = [tensor.name for tensor in tensors if tensor.ragged]
    if fixed and ragged and not any(tensor.name in kept for tensor in tensors):
        yield _extract(part, fixed, ())
        yield _extract(part, ragged, fixed)
    else:
        yield part


def _extract(part: OnnxForm, outputs: Sequence[str], given: Collection[str]) -> OnnxForm:
    """What makes some of a part's outputs from its inputs, and from others of its outputs that are given."""
    graph = part.model.graph
    waiting, seen = [value for value in graph.outputs if value.name in outputs], set[str]()
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if str(value.name) not in seen and producer is not None and value.name not in given:
            waiting += [each for each in producer.inputs if each is not None]
        seen.add(str(value.name))
    names = [spec.name for spec in (*part.graphs[0].inputs, *part.graphs[0].outputs)]
    inputs = [name for name in names if name in seen and name not in outputs]
    found = ir.convenience.extract(graph, inputs, outputs)
    graphs = []
    for spec in part.graphs:
        specs = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        sides = (tuple(specs[name] for name in side) for side in (inputs, outputs))
        graphs.append(GraphSpec(spec.key, *sides))
    placements = {weight: place for weight, place in part.placements.items() if weight in found.initializers}
    model = ir.Model(found, ir_version=part.model.ir_version)
    return replace(part, model=model, placements=placements, graphs=tuple(graphs))


def _outputs(part: OnnxForm) -> list[_Tensor]:
    outputs = zip(*(spec.outputs for spec in part.graphs), strict=True)
    return [_Tensor(each[0].name, each[0].dtype, tuple(spec.shape for spec in each)) for each in outputs]


def _packs_of(part: OnnxForm, kept: Collection[str], name: str) -> list[_Pack]:
    """What a part's outputs are packed into: one matrix, or none where there is nothing to join."""
    able = [tensor for tensor in _outputs(part) if tensor.packable and tensor.name not in kept]
    able = [tensor for tensor in able if tensor.rows == able[0].rows]
    return [_Pack(name, tuple(able))] if len(able) > 1 else []


def _replaced(specs: Sequence[TensorSpec], packs: Sequence[_Pack], graph: int) -> tuple[TensorSpec, ...]:
    gone = {name for pack in packs for name in pack.names}
    return (*(pack.spec(graph) for pack in packs), *(spec for spec in specs if spec.name not in gone))


def _write(graph: ir.Graph, pack: _Pack) -> None:
    """Let a network give a pack in place of its values."""
    values, tape = {str(value.name): value for value in graph.outputs}, Tape()
    rows = []
    for tensor in pack.tensors:
        value = values[tensor.name]
        if tensor.dtype != pack.dtype:
            value = tape.op("Cast", [value], {"to": _kind(pack.dtype)})
        rows.append(tape.op("Reshape", [value, _sizes(tape, f"{pack.name}_{tensor.name}", [-1, tensor.width])]))
    packed = pack.value()
    tape.op("Concat", rows, {"axis": 1}, output=packed)
    _name(tape, f"{pack.name}_written")
    graph.extend(tape.nodes)
    _keep(graph, tape)
    graph.outputs[:] = [packed, *(value for value in graph.outputs if value.name not in pack.names)]


def _read(graph: ir.Graph, pack: _Pack) -> None:
    """Let a network take a pack in place of those of its values that it takes."""
    packed, tape = pack.value(), Tape()
    inputs = {str(value.name): value for value in graph.inputs if value.name in pack.names}
    first = 0
    for tensor in pack.tensors:
        ends, name = {"first": first, "last": first + tensor.width, "axis": 1}, f"{pack.name}_{tensor.name}"
        first += tensor.width
        if tensor.name not in inputs:
            continue
        value = tape.op("Slice", [packed, *(_sizes(tape, f"{name}_{what}", [at]) for what, at in ends.items())])
        value = tape.op("Reshape", [value, _sizes(tape, f"{name}_shape", tensor.target)])
        if tensor.dtype != pack.dtype:
            value = tape.op("Cast", [value], {"to": _kind(tensor.dtype)})
        inputs[tensor.name].replace_all_uses_with(value)
    _name(tape, f"{pack.name}_read")
    graph.insert_before(graph[0], tape.nodes)
    _keep(graph, tape)
    graph.inputs[:] = [packed, *(value for value in graph.inputs if value.name not in pack.names)]


def _sizes(tape: Tape, name: str, sizes: Sequence[int]) -> ir.Value:
    return tape.initializer(ir.tensor(np.array(sizes, np.int64), name=name))


def _name(tape: Tape, prefix: str) -> None:
    """Names that are the same in each build."""
    for index, node in enumerate(tape.nodes):
        node.name = f"{prefix}_{index}"
        for value in node.outputs:
            value.name = value.name or node.name


def _keep(graph: ir.Graph, tape: Tape) -> None:
    for value in tape.initializers:
        graph.register_initializer(value)


def _kind(dtype: str) -> ir.DataType:
    return ir.DataType[DTYPES[dtype].onnx.upper()]
