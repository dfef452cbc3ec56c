"""Decompositions in a graph: what the exporter would make of the program by tracing it again, without tracing it."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from pyrexport.export.lowering.graphs import GraphModule
from pyrexport.export.lowering.onnx import export_onnx
from pyrexport.runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from pyrexport.targets.dialect import Dialect
from torch.export import Dim, ExportedProgram

X, Y = torch.arange(24.0).reshape(2, 3, 4) / 7 - 1, torch.full((2, 3, 4), 0.3)

Graph = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DECOMPOSED: dict[str, Graph] = {
    "a cast": lambda x, y: x.to(torch.int32) + y,
    "a cast that changes nothing": lambda x, y: x.float() * y,
    "a cast that is the output": lambda x, y: (x + y).float(),
    "a constant": lambda x, y: torch.tensor([1.0, 2.0, 3.0, 4.0]) * x - y,
    "a reshape of what lies apart": lambda x, y: (x.transpose(0, 1).reshape(6, 4) @ y.reshape(4, -1)).flatten(),
    "axes made of one": lambda x, y: x.unflatten(2, (2, -1)).flatten(0, 1) + y.reshape(6, 2, 2),
    "from a number": lambda x, y: 1.0 - x * y,
}
TRACED: dict[str, Graph] = {
    "an operator of the exporter's table": lambda x, y: torch.rsub(x * y, 1.0, alpha=2),
    "an operator that changes what it is given": lambda x, y: (x * 2).add_(y),
    "an operator in none of its tables": lambda x, y: torch.swapaxes(x, 0, 1) + y.moveaxis(0, 1),
}


class Module(torch.nn.Module):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.graph(x, y)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, exports_each_time: None) -> list[ExportedProgram]:
    """Programs that were traced once more."""
    found, decompose = list[ExportedProgram](), ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram, "run_decompositions", lambda program, table: found.append(program) or decompose(program, table)
    )
    return found


def exported(graph: Graph, symbols: dict[str, dict[int, Dim]]) -> ir.Model:
    inputs = tuple(TensorSpec(name, tuple(X.shape), "float32") for name in "xy")
    out = graph(X.clone(), Y.clone())
    spec = GraphSpec(stage_key(0), inputs, (TensorSpec("out", tuple(out.shape), "float32"),))
    return export_onnx(GraphModule(spec, Module(graph), symbols), Dialect(), "graph").model


def assert_computes(model: ir.Model, graph: Graph, x: torch.Tensor, y: torch.Tensor) -> None:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
    np.testing.assert_allclose(found, graph(x.clone(), y.clone()).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_program_is_not_traced_again(name: str, traced: list[ExportedProgram]) -> None:
    model = exported(DECOMPOSED[name], {})
    assert not traced
    assert_computes(model, DECOMPOSED[name], X, Y)


@pytest.mark.parametrize("name", TRACED)
def test_sizes_go_on_varying_where_a_program_is_traced_again(name: str, traced: list[ExportedProgram]) -> None:
    """Its guards of sizes are Python, which is called then."""
    count = Dim("count", min=2, max=64)
    model = exported(TRACED[name], {"x": {2: count}, "y": {2: count}})
    assert traced
    for times in (1, 3):
        assert_computes(model, TRACED[name], X.repeat(1, 1, times), Y.repeat(1, 1, times))


@pytest.mark.parametrize("name", TRACED)
def test_a_program_is_traced_again_where_its_graph_does_not_do(name: str, traced: list[ExportedProgram]) -> None:
    model = exported(TRACED[name], {})
    assert traced
    assert_computes(model, TRACED[name], X, Y)


def test_sizes_that_vary_go_on_varying(traced: list[ExportedProgram]) -> None:
    def graph(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.transpose(0, 1).reshape(-1, 4) + y.flatten(0, 1)).unflatten(0, (x.shape[0], 3))

    count = Dim("count", min=2)
    model = exported(graph, {"x": {0: count}, "y": {0: count}})
    assert not traced
    for times in (1, 3):
        assert_computes(model, graph, X.repeat(times, 1, 1), Y.repeat(times, 1, 1))


def test_it_is_what_the_exporter_makes_of_it(traced: list[ExportedProgram], monkeypatch: pytest.MonkeyPatch) -> None:
    """Operator by operator."""
    from pyrexport.export.lowering import onnx

    def graph(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for each in list(DECOMPOSED.values())[:4]:
            x = each(x, y).float()
        return DECOMPOSED["axes made of one"](x, y)

    found = exported(graph, {})
    monkeypatch.setattr(onnx, "decompose", lambda program: None)
    wanted = exported(graph, {})
    assert len(traced) == 1
    assert [node.op_type for node in found.graph] == [node.op_type for node in wanted.graph]
