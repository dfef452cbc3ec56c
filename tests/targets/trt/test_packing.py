"""What crosses between TensorRT's engines, packed, on ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pyrexport.runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from pyrexport.targets.forms import OnnxForm
from pyrexport.targets.trt.packing import pack_crossings

FIRST = """<ir_version: 10, opset_import: ["": 21]> a (float[1,n,4] x, float[3] y) => (
  float[1,n,4] tokens, float16[n,1,2] rotary, float[3] fixed, float16[1,2] small, int64[1] whole
) {
  whole = Constant <value_ints: ints = [16777217]> ()
  tokens = Exp(x)
  both = Constant <value_ints: ints = [2, 2]> ()
  axis = Constant <value_ints: ints = [1]> ()
  left, right = Split <axis: int = 2> (x, both)
  rows = Cast <to: int = 10> (left)
  zero = Constant <value_ints: ints = [0]> ()
  turned = Squeeze(rows, zero)
  rotary = Unsqueeze(turned, axis)
  fixed = Neg(y)
  ends = Constant <value_ints: ints = [2]> ()
  begin = Slice(y, zero, ends)
  flat = Unsqueeze(begin, zero)
  small = Cast <to: int = 10> (flat)
}"""
SECOND = """<ir_version: 10, opset_import: ["": 21]> b (
  float[1,n,4] tokens, float16[n,1,2] rotary, float[3] fixed, float16[1,2] small, int64[1] whole
) => (float[1,n,4] out, float16[n,1,2] turned, float[3] kept, int64[1] counted) {
  scale = Constant <value_float: float = 2.0> ()
  out = Mul(tokens, scale)
  turned = Mul(rotary, small)
  kept = Exp(fixed)
  counted = Add(whole, whole)
}"""
ROWS = (5, 2)


def form_of(name: str, text: str) -> OnnxForm:
    model = ir.from_proto(onnx.parser.parse_model(text))
    specs = []
    for stage, n in enumerate(ROWS):
        sides = (
            tuple(
                TensorSpec(v.name, tuple(s if isinstance(s, int) else n for s in v.shape), str(v.dtype.numpy()))
                for v in values
            )
            for values in (model.graph.inputs, model.graph.outputs)
        )
        specs.append(GraphSpec(stage_key(stage), *sides))
    return OnnxForm(name, model, {}, Path(), tuple(specs))


def run(form: OnnxForm, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(form.model).SerializeToString())
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {v.name: values[v.name] for v in session.get_inputs()}), strict=True))


@pytest.mark.parametrize("stage", [0, 1])
def test_what_crosses_packed_is_what_crossed(stage):
    """Rows that differ between graphs, values that do not, two dtypes; a whole number beyond float32 goes as it is."""
    rng = np.random.default_rng(stage)
    given = {"x": rng.standard_normal((1, ROWS[stage], 4), np.float32), "y": rng.standard_normal(3, np.float32)}
    crossed = run(form_of("stages", FIRST), given)
    wanted = run(form_of("stages-2", SECOND), crossed)
    conditioning, first, second = pack_crossings([form_of("stages", FIRST), form_of("stages-2", SECOND)], ["out"])
    assert [part.name for part in (conditioning, first, second)] == ["stages", "stages-2", "stages-3"]
    values = dict(given)
    for part, widths in (
        (conditioning, {"crossing": (1, 3 + 2), "whole": (1,)}),
        (first, {"crossing-2": (ROWS[stage], 4 + 2)}),
    ):
        values |= run(part, values)
        assert {spec.name: spec.shape for spec in part.graphs[stage].outputs} == widths
        assert {name: values[name].shape for name in widths} == widths
    assert {spec.name for spec in second.graphs[stage].inputs} == {"whole", "crossing", "crossing-2"}
    found = run(second, values)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
