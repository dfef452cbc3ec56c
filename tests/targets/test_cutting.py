"""Networks that are cut into several."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pyrexport.runtime.bundle.graphs import GraphKey, GraphSpec, TensorSpec
from pyrexport.runtime.errors import UsageError
from pyrexport.targets.cutting import cut_network, stored_bytes
from pyrexport.targets.forms import OnnxForm, Placement

ROWS, WIDTH, HIDDEN, BLOCKS = 5, 8, 64, 4


def form_of(text: str, weights: dict[str, np.ndarray], constants: dict[str, Any], *specs: GraphSpec) -> OnnxForm:
    """A network in ONNX's own words, whose weights are placed in a file."""
    graph = onnx.parser.parse_graph(text)
    for name, value in (weights | constants).items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    placements = {name: Placement(0, value.nbytes, value.shape, "float32") for name, value in weights.items()}
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    return OnnxForm(graph.name, inferred, placements, Path("weights.bin"), specs)


@pytest.fixture
def chain() -> OnnxForm:
    """Blocks of two products [8, 64] and [64, 8] around a residual stream, which all add a table to what they take."""
    draw, nodes, weights = np.random.default_rng(0), ["table = Mul(axis, axis)", "x0 = Identity(x)"], {}
    for index in range(BLOCKS):
        weights[f"a{index}"] = draw.standard_normal((WIDTH, HIDDEN), np.float32)
        weights[f"b{index}"] = draw.standard_normal((HIDDEN, WIDTH), np.float32)
        nodes += [
            f"s{index} = Add(x{index}, table)",
            f"h{index} = MatMul(s{index}, a{index})",
            f"y{index} = MatMul(h{index}, b{index})",
            f"x{index + 1} = Add(x{index}, y{index})",
        ]
    shape = f"float[{ROWS},{WIDTH}]"
    text = f"blocks ({shape} x) => ({shape} x{BLOCKS}) {{ {chr(10).join(nodes)} }}"
    spec = GraphSpec(GraphKey("stage"), (TensorSpec("x", (ROWS, WIDTH)),), (TensorSpec("x4", (ROWS, WIDTH)),))
    return form_of(text, weights, {"axis": draw.standard_normal(WIDTH, np.float32)}, spec)


@pytest.mark.parametrize(
    ("limit", "ends"),
    [(10**9, ["x4"]), (9000, ["x2", "x4"]), (4200, ["x1", "x2", "x3", "x4"]), (13000, ["x2", "x4"])],
)
def test_a_network_is_cut_between_its_blocks(chain, limit, ends):
    """Of 4,096 bytes each, and 32 of the table's; each weight goes to one part, and no table from part to part."""
    parts = cut_network(chain, limit, "--limit")
    assert [[value.name for value in part.model.graph.outputs] for part in parts] == [[end] for end in ends]
    begins = ["x", *ends[:-1]]
    assert [[value.name for value in part.model.graph.inputs] for part in parts] == [[begin] for begin in begins]
    assert all(stored_bytes(part) <= limit for part in parts)
    assert sorted(name for part in parts for name in part.placements) == sorted(chain.placements)
    value = given = np.random.default_rng(1).standard_normal((ROWS, WIDTH), np.float32)
    for part, begin in zip(parts, begins, strict=True):
        (value,) = _run(part.model, {begin: value})
    np.testing.assert_array_equal(value, _run(chain.model, {"x": given})[0])


def _run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings).run(None, inputs)


def test_a_matrix_is_not_cut(chain):
    with pytest.raises(
        UsageError,
        match=r"at most 2,000 bytes of weights: expected a --limit of at least 2,048, which one of its nodes",
    ):
        cut_network(chain, 2000, "--limit")


def test_a_matrix_exceeds_a_limit_that_nobody_gave(chain):
    """The first one, of 4 KiB, is a part by itself; the others are cut as if it were not there."""
    table = ir.tensor(np.zeros((WIDTH, 2 * HIDDEN), np.float32), name="a0")
    chain.model.graph.initializers["a0"].const_value = table
    chain.placements["a0"] = Placement(0, table.nbytes, (WIDTH, 2 * HIDDEN), "float32")
    parts = cut_network(chain, 2100)
    assert [max(place.nbytes for place in part.placements.values()) for part in parts] == [4096, *[2048] * 7]
    assert [len(part.placements) for part in parts] == [1] * 8


PRODUCTS = 4


@pytest.fixture
def symbolic() -> OnnxForm:
    """Pairs of products [8, 64] of what is rounded once to 8 bits, each summed to 8 columns by sizes of the input."""
    draw, weights = np.random.default_rng(0), {}
    nodes = ["rows = Shape <end = 1> (x)", "split = Concat <axis = 0> (rows, inner)", "y0 = Identity(x)"]
    for index in range(0, PRODUCTS, 2):
        nodes += [f"q{index} = QuantizeLinear(y{index}, scale, zero)", f"d{index} = DequantizeLinear(q{index}, scale)"]
        for each in (index, index + 1):
            weights[f"w{each}"] = draw.standard_normal((WIDTH, HIDDEN), np.float32)
            nodes += [
                f"h{each} = MatMul(d{index}, w{each})",
                f"s{each} = Reshape(h{each}, split)",
                f"m{each} = ReduceSum <keepdims = 0> (s{each}, last)",
                f"y{each + 1} = Add(y{each}, m{each})",
            ]
    text = f"pairs (float[N,{WIDTH}] x) => (float[N,{WIDTH}] y{PRODUCTS}) {{ {chr(10).join(nodes)} }}"
    constants = {"scale": np.float32(0.05), "zero": np.int8(0), "inner": np.array([WIDTH, -1]), "last": np.array([-1])}
    specs = [
        GraphSpec(
            GraphKey("stage", index), (TensorSpec("x", (rows, WIDTH)),), (TensorSpec(f"y{PRODUCTS}", (rows, WIDTH)),)
        )
        for index, rows in enumerate((ROWS, 3))
    ]
    return form_of(text, weights, constants, *specs)


def test_a_weight_that_two_parts_take_counts_in_both(chain):
    """As the upsampler's do that a decoder applies to frame after frame."""
    first = next(value for value in chain.model.graph.initializers.values() if value.name == "a0")
    for node in chain.model.graph:
        for index, value in enumerate(node.inputs):
            if value.name == "a2":
                node.replace_input_with(index, first)
    parts = cut_network(chain, 4200, "--limit")
    assert ["a0" in part.placements for part in parts] == [True, False, True, False]
    assert all(stored_bytes(part) <= 4200 for part in parts)


def test_a_network_of_symbolic_shapes_is_cut_for_all_its_graphs(symbolic):
    """Sizes and rounding are made again in each part: what crosses has no integers, and is shaped for each graph."""
    parts = cut_network(symbolic, 2200, "--limit")
    assert [part.name for part in parts] == ["pairs", "pairs-2", "pairs-3", "pairs-4"]
    assert sorted(name for part in parts for name in part.placements) == sorted(symbolic.placements)
    for part in parts:
        (product,) = (node for node in part.model.graph if node.op_type == "MatMul")
        assert product.inputs[0].producer().op_type == "DequantizeLinear"
        assert {tensor.dtype for spec in part.graphs for tensor in (*spec.inputs, *spec.outputs)} == {"float32"}
    for index, spec in enumerate(symbolic.graphs):
        given = np.random.default_rng(1).standard_normal(spec.inputs[0].shape, np.float32)
        values = {"x": given}
        for part in parts:
            of = part.graphs[index]
            made = _run(part.model, {tensor.name: values[tensor.name] for tensor in of.inputs})
            assert [value.shape for value in made] == [tensor.shape for tensor in of.outputs]
            values |= {tensor.name: value for tensor, value in zip(of.outputs, made, strict=True)}
        np.testing.assert_array_equal(values[f"y{PRODUCTS}"], _run(symbolic.model, {"x": given})[0])
