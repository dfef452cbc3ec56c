"""Blocks that are exported once and repeated: the graph is that of all of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from pyrexport.export.bundle.parts import Options, Part, graph_parts
from pyrexport.export.families.dialects import FUSED
from pyrexport.export.families.typed_dialect import TYPED
from pyrexport.export.lowering.onnx import STANDARD_OPERATORS, Graph, export_onnx
from pyrexport.export.lowering.repeat import are_alike, as_calls
from pyrexport.runtime.model.checkpoint import read_checkpoint


def first_stage(checkpoint: Path, dialect: Any, symbolic: bool) -> Part:
    return next(graph_parts(read_checkpoint(checkpoint), Options(layout="shared"), dialect, symbolic=symbolic))


def evaluate(graph: Graph, part: Part) -> Any:
    """The graph's output with weights of its own, told by their names."""
    for name, source in graph.sources.items():
        rng = np.random.default_rng(list(name.encode()))
        values = 0.1 * rng.standard_normal(source.shape, np.float32)
        graph.model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.standard_normal(spec.shape, np.float32) for spec in part.inputs}
    session = ort.InferenceSession(ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "operators"), [(FUSED, None), (TYPED, STANDARD_OPERATORS)], ids=["onnxruntime", "tensorrt"]
)
def test_a_repeated_block_computes_what_all_of_them_do(tiny: Path, dialect: Any, operators: Any) -> None:
    """Bit for bit, with weights that differ from block to block; TensorRT's with symbolic shapes. 15 s each."""
    kinds, outputs = [], []
    for repeats in (True, False):
        part = first_stage(tiny, dialect, symbolic=dialect is TYPED)
        graph = export_onnx(
            part.module, part.inputs, part.outputs, part.name, operators=operators, symbols=part.symbols,
            layers=part.layers if repeats else (),
        )  # fmt: skip
        assert len(part.layers) == 2
        assert not graph.model.functions
        kinds.append(Counter(node.op_type for node in graph.model.graph))
        outputs.append(evaluate(graph, part))
    assert np.array_equal(*outputs)
    assert np.abs(outputs[0]).max() > 0
    # With symbolic shapes a size is computed once more: six operators, however many blocks.
    assert (kinds[0] - kinds[1]).total() == (0 if dialect is FUSED else 6)
    assert not kinds[1] - kinds[0]


def test_blocks_that_differ_are_not_repeated() -> None:
    linear = torch.nn.Linear
    assert are_alike([linear(2, 3), linear(2, 3)])
    assert not are_alike([linear(2, 3)])
    assert not are_alike([linear(2, 3), linear(3, 2)])
    assert not are_alike([linear(2, 3), linear(2, 3, bias=False)])
    assert not are_alike([linear(2, 3), linear(2, 3).half()])
    assert not are_alike([torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)])  # with buffers, which no call hands over


def test_modules_are_left_as_they_were() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    before = layers[0](torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="stopped"), as_calls(layers):
        raise RuntimeError("stopped")
    assert torch.equal(layers[0](torch.ones(1, 2)), before)
