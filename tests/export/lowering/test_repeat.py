"""Blocks that are exported once and repeated: the graph is that of all of them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from pyrexport.export.lowering.graphs import GraphModule
from pyrexport.export.lowering.onnx import OnnxExport, export_onnx
from pyrexport.export.lowering.repeat import as_calls, kinds_of
from pyrexport.targets.ort import TARGET as ORT
from pyrexport.targets.trt import TARGET as TRT
from support.graphs import blueprint, graph_of


def evaluate(exported: OnnxExport, graph: GraphModule) -> Any:
    """The graph's output with weights of its own, told by their names."""
    for name, source in exported.sources.items():
        rng = np.random.default_rng(list(name.encode()))
        values = 0.1 * rng.standard_normal(source.stored.shape, np.float32)
        exported.model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    rng = np.random.default_rng(0)
    inputs = {spec.name: rng.standard_normal(spec.shape, np.float32) for spec in graph.spec.inputs}
    session = ort.InferenceSession(ir.to_proto(exported.model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"), [(ORT, {}), (TRT, {"layout": "shared"})], ids=["onnxruntime", "tensorrt"]
)
def test_a_repeated_block_computes_what_all_of_them_do(tiny: Path, target: Any, options: Any) -> None:
    """Bit for bit, with weights that differ from block to block; TensorRT's with symbolic shapes. 15 s each."""
    drawn = blueprint(tiny, target, **options)
    graph = graph_of(drawn, "stage0")
    assert len(graph.layers) == 2
    assert bool(graph.symbols) == target.symbolic
    kinds, outputs = [], []
    for layers in (graph.layers, ()):
        exported = export_onnx(replace(graph, layers=layers), drawn.dialect, "stage0")
        assert not exported.model.functions
        kinds.append(Counter(node.op_type for node in exported.model.graph))
        outputs.append(evaluate(exported, graph))
    assert np.array_equal(*outputs)
    assert np.abs(outputs[0]).max() > 0
    # With symbolic shapes a size is computed once more: six operators, however many blocks.
    assert (kinds[0] - kinds[1]).total() == (6 if target.symbolic else 0)
    assert not kinds[1] - kinds[0]


def test_blocks_are_repeated_by_kind() -> None:
    linear = torch.nn.Linear
    first, second, third = linear(2, 3), linear(2, 3), linear(2, 3, bias=False)
    assert kinds_of([first, second]) == [[first, second]]
    assert kinds_of([first, third, second]) == [[first, second], [third]]
    assert kinds_of([first]) == []
    for other in (linear(3, 2), third, linear(2, 3).half()):
        assert kinds_of([first, other]) == []
    assert kinds_of([torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)]) == []  # with buffers, which no call hands over


def test_modules_are_left_as_they_were() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    before = layers[0](torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="stopped"), as_calls([layers]):
        raise RuntimeError("stopped")
    assert torch.equal(layers[0](torch.ones(1, 2)), before)
