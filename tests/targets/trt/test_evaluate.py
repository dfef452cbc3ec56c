"""Networks that are evaluated without their device: what the engine rounds is rounded, and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pyrexport.targets.trt.evaluate import widen

TOKENS, INPUTS, OUTPUTS = 6, 32, 24
DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((TOKENS, INPUTS)).astype(np.float32)
WEIGHT = DRAW.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)


def model_of(nodes: Sequence[Any], initializers: Sequence[Any], width: int) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (TOKENS, w)) for n, w in (("x", INPUTS), ("y", width))]
    graph = helper.make_graph(list(nodes), "network", ends[:1], ends[1:], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    own = ir.from_proto(model)
    widen(own)
    return ir.to_proto(own)


def run(model: onnx.ModelProto) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": X})[0]
    return found


def matrix(name: str, values: NDArray[np.float32], kind: int) -> Any:
    return helper.make_tensor(name, kind, values.shape, values.flatten().tolist())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_of_16_bits_are_rounded(dtype):
    """Each value of the product is one of 16 bits: the nearest to the exact sum, or the next to it."""
    kind, short = helper.np_dtype_to_tensor_dtype(np.dtype(np.float16)), getattr(torch, dtype)
    kind = TensorProto.BFLOAT16 if dtype == "bfloat16" else kind
    nodes = [
        helper.make_node("Cast", ["x"], ["given"], to=kind),
        helper.make_node("MatMul", ["given", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    bias = DRAW.standard_normal(OUTPUTS).astype(np.float32)
    model = widened(model_of(nodes, [matrix("w", WEIGHT, kind), matrix("b", bias, kind)], OUTPUTS))
    found = torch.from_numpy(run(model))
    assert torch.equal(found, found.to(short).float())
    x, weight, own = (torch.from_numpy(each).to(short).float() for each in (X, WEIGHT, bias))
    exact = (x @ weight).to(short).float() + own
    assert bool(((found - exact).abs() <= torch.finfo(short).eps * exact.abs().clamp(min=1)).all())
    assert not torch.allclose(found, x @ weight + own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "scale"), [(TensorProto.INT8, 0.015), (TensorProto.FLOAT8E4M3FN, 0.004)])
def test_values_of_8_bits_are_those_of_the_standard_operators(kind, scale):
    """Some are cut. ONNX Runtime's own operators say what they are to be; no integers are left."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["held"]),
        helper.make_node("Identity", ["held"], ["y"]),
    ]
    initializers = [matrix("s", np.array(scale, np.float32), TensorProto.FLOAT), helper.make_tensor("z", kind, [], [0])]
    model = model_of(nodes, initializers, INPUTS)
    wanted, other = run(model), widened(model)
    np.testing.assert_array_equal(run(other), wanted)
    assert np.abs(wanted).max() < np.abs(X).max()
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in other.graph.node}


def test_products_of_integers_are_exact():
    """Where AVX2's sums are cut, float32's are not: the largest integers, in a row."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["given"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["weight"], axis=1),
        helper.make_node("MatMul", ["given", "weight"], ["y"]),
    ]
    integers = np.full((INPUTS, OUTPUTS), 127, np.int8)
    initializers = [
        matrix("s", np.array(0.001, np.float32), TensorProto.FLOAT),
        helper.make_tensor("z", TensorProto.INT8, [], [0]),
        helper.make_tensor("w", TensorProto.INT8, integers.shape, integers.flatten().tolist()),
        matrix("ws", np.full(OUTPUTS, 0.01, np.float32), TensorProto.FLOAT),
    ]
    found = run(widened(model_of(nodes, initializers, OUTPUTS)))
    held = np.clip(np.round(X / np.float32(0.001)), -128, 127).astype(np.float64) * 0.001
    np.testing.assert_allclose(found, held @ (integers * 0.01), rtol=1e-4, atol=1e-5)
