"""The integer products of a stage as the engine ran them, and their sums in NumPy as either kernel adds them.

Without VNNI, ONNX Runtime multiplies u8 and s8 with vpmaddubsw, which adds two products in int16 and saturates;
VNNI's vpdpbusd adds four in int32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from pyrexport.runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from pyrexport.runtime.chain.plan import StepPlan
from pyrexport.runtime.pipeline.pipeline import Pipeline

OPERATOR = "MatMulIntegerToFloat"
AT_ONCE = 20
"""Products that are watched in one run: their inputs and results are all in memory."""
INT16 = np.iinfo(np.int16)
HALF_ULP = 2.0**-24
"""The largest relative error of one float32 rounding."""


@dataclass(frozen=True)
class Product:
    """A product of integers as the engine ran it."""

    layer: str
    x: NDArray[np.uint8]  # [rows, in]
    zero: int
    scale: float
    values: NDArray[np.int8]  # [in, out]
    scales: NDArray[np.float32]  # [out]
    bias: NDArray[np.float32]  # [out]
    y: NDArray[np.float32]  # [rows, out]

    def result(self, sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """s · sᵢ · (Σ x·w - z · Σ w) + b of given Σ x·w [rows, out]."""
        return self._scaled(sums) + self.bias

    def distance(self, sums: NDArray[np.int64]) -> float:
        """Largest error of the engine's y if these are its sums, as a share of what rounding may cost.

        Four values are rounded to float32, by half an ulp each: the product of the scales, the sum, their product, and
        that with the bias.
        """
        bound = 4 * HALF_ULP * (np.abs(self._scaled(sums)) + np.abs(self.bias)) + np.finfo(np.float32).tiny
        return float((np.abs(self.y - self.result(sums)) / bound).max())

    def _scaled(self, sums: NDArray[np.int64]) -> NDArray[np.float64]:
        whole = sums - self.zero * self.values.sum(0, dtype=np.int64)
        return np.asarray(whole * (self.scale * self.scales.astype(np.float64)))


def exact_sums(x: NDArray[np.uint8], values: NDArray[np.int8]) -> NDArray[np.int64]:
    """Σ x·w [rows, out] as VNNI makes it: none of its partial sums leaves int32."""
    return np.asarray(x.astype(np.float64) @ values.astype(np.float64)).astype(np.int64)  # integers below 2⁵³


def avx2_sums(x: NDArray[np.uint8], values: NDArray[np.int8]) -> tuple[NDArray[np.int64], int]:
    """Σ x·w [rows, out] as AVX2 makes it: neighbours along the input axis are added in int16, which saturates.

    Returns:
        the sums, and how many pairs left int16.
    """
    sums = np.zeros((len(x), values.shape[1]), np.int64)
    lost = 0
    for k in range(0, len(values), 2):
        pair = x[:, k : k + 2].astype(np.float32) @ values[k : k + 2].astype(np.float32)  # integers below 2²⁴
        held = np.clip(pair, INT16.min, INT16.max)
        lost += int(np.count_nonzero(held != pair))
        sums += held.astype(np.int64)
    return sums, lost


def listed_kernel(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The kernel that the CPU's flags promise; None where no file lists them, or neither is among them."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    if flags & {"avx_vnni", "avx512_vnni", "amx_int8"}:
        return "vnni"
    return "avx2" if "avx2" in flags else None


def used_kernel() -> str:
    """The kernel that ONNX Runtime uses here, by a product whose every pair leaves int16: "avx2" or "vnni"."""
    x, values = np.full((5, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    given = {"scale": np.float32(1), "scales": np.ones(32, np.float32), "zero": np.uint8(0), "values": values}
    node = helper.make_node(OPERATOR, ["x", "values", "scale", "scales", "zero"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (5, 32))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()],
    )
    versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    forms = {"vnni": exact_sums(x, values), "avx2": avx2_sums(x, values)[0]}
    return next(name for name, sums in forms.items() if np.array_equal(y, sums))


def watch(
    pipeline: Pipeline, step: StepPlan, latent: NDArray[np.float32], text: NDArray[np.float32]
) -> Iterator[Product]:
    """The integer products of one evaluation of a stage, in the graph's order.

    Raises:
        RuntimeError: the stage computes something else when it is watched.
    """
    entry = pipeline.bundle.manifest.graphs[stage_key(step.stage.index, step.expert)]
    inputs = pipeline.stage_inputs(step, latent, {"text": text})
    plain = pipeline.run(entry.spec.key, inputs)["velocity"]
    model = ir.load(pipeline.bundle.file(entry.file))
    own = list(model.graph.outputs)
    nodes = [node for node in model.graph if node.op_type == OPERATOR]
    for start in range(0, len(nodes), AT_ONCE):
        batch = nodes[start : start + AT_ONCE]
        inner = list(dict.fromkeys(value for node in batch for value in _ends(node) if value.const_value is None))
        model.graph.outputs[:] = [*own, *inner]
        spec = GraphSpec(entry.spec.key, entry.spec.inputs, (*entry.spec.outputs, *map(_spec, inner)))
        data = ir.to_proto(model).SerializeToString()
        engine = pipeline.target.open_model(data, pipeline.bundle.folder, spec, entry.facts, pipeline.graphs.options)
        found = engine.run(inputs)
        engine.close()
        if not np.array_equal(found["velocity"], plain):
            raise RuntimeError(f"{entry.file} computes something else when it is watched")
        yield from (_product(node, found) for node in batch)


def _ends(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None]


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    return TensorSpec(str(value.name), tuple(int(n) for n in value.shape.numpy()), str(value.dtype.numpy()))


def _product(node: ir.Node, found: dict[str, NDArray[Any]]) -> Product:
    def array(value: ir.Value | None) -> NDArray[Any]:
        if value is None:
            return np.zeros(1, np.float32)
        return found[str(value.name)] if value.const_value is None else value.const_value.numpy()

    x, values, scale, scales, zero, _, bias = map(array, (*node.inputs, None)[:7])
    y = array(node.outputs[0])
    assert node.inputs[1] is not None
    layer = str(node.inputs[1].name).removesuffix(".values")
    rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return Product(layer, rows[0], int(zero.item()), float(scale.item()), values, scales, bias, rows[1])
