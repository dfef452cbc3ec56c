"""ONNX Runtime's own operators, of which the onnx package has no schemas, and products of integers without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnxscript
from onnx.defs import OpSchema
from onnxscript import opset23

from ..operators import expanded_weight

__all__ = [
    "integer_conv",
    "integer_matmul",
    "multi_head_attention",
    "quantise",
    "quantised_matmul",
    "quick_gelu",
    "rotary",
    "standard_conv",
    "standard_matmul",
]


def _schema(
    name: str,
    inputs: Sequence[str],
    types: Mapping[str, list[str]],
    attributes: Sequence[str],
    output: str | None = None,
    kind: OpSchema.AttrType = OpSchema.AttrType.INT,
) -> Any:
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(f"input_{i}", each) for i, each in enumerate(inputs)],
        outputs=[OpSchema.FormalParameter("output", output or inputs[0])],
        type_constraints=[(each, allowed, "") for each, allowed in types.items()],
        attributes=[OpSchema.Attribute(attribute, kind, required=True) for attribute in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, schema)


_FLOAT = {"T": ["tensor(float)"]}
_MATMUL_N_BITS = _schema(
    "MatMulNBits",
    ["T", "B", "T"],
    _FLOAT | {"B": ["tensor(uint8)"]},
    ["K", "N", "bits", "block_size", "accuracy_level"],
)
_MULTI_HEAD_ATTENTION = _schema("MultiHeadAttention", ["T", "T", "T"], _FLOAT, ["num_heads"])
_ROTARY_EMBEDDING = _schema(
    "RotaryEmbedding", ["T", "I", "T", "T"], _FLOAT | {"I": ["tensor(int64)"]}, ["interleaved", "num_heads"]
)


_QUICK_GELU = _schema("QuickGelu", ["T"], _FLOAT, ["alpha"], kind=OpSchema.AttrType.FLOAT)
_MATMUL_INTEGER_TO_FLOAT = _schema(
    "MatMulIntegerToFloat",
    ["A", "B", "T", "T", "A", "B", "T"],
    _FLOAT | {"A": ["tensor(uint8)"], "B": ["tensor(int8)"]},
    [],
    output="T",
)


def integer_matmul(x: Any, values: Any, scales: Any, bias: Any = None, scale: Any = None, zero: Any = None) -> Any:
    """A product of 8-bit integers; inputs that layers share are rounded once, where ONNX Runtime finds them equal."""
    if scale is None:
        integers, scale, zero = opset23.DynamicQuantizeLinear(x)
    else:
        integers = opset23.QuantizeLinear(x, scale, zero)
    return _MATMUL_INTEGER_TO_FLOAT(integers, values, scale, scales, zero, None, bias)


def quantise(x: Any, scale: Any, zero: Any) -> Any:
    """8-bit integers."""
    return opset23.QuantizeLinear(x, scale, zero)


def integer_conv(
    x: Any,
    scale: Any,
    zero: Any,
    values: Any,
    scales: Any,
    bias: Any,
    output_scale: Any,
    output_zero: Any,
    padding: int,
) -> Any:
    """A convolution of 8-bit integers: with QDQ around `Conv`, ONNX Runtime would hold the weights in float32."""
    middle = opset23.Constant(value=onnx.helper.make_tensor("middle", onnx.TensorProto.INT8, [], [0]))
    # A bias is in units of the sums: made of constants, once, when a session is opened.
    units = opset23.Cast(opset23.Round(opset23.Div(bias, opset23.Mul(scales, scale))), to=onnx.TensorProto.INT32)
    given = x, scale, zero, values, scales, middle, output_scale, output_zero, units
    y = opset23.QLinearConv(*given, pads=[padding] * 4)
    return opset23.DequantizeLinear(y, output_scale, output_zero)


def multi_head_attention(query: Any, key: Any, value: Any, heads: int) -> Any:
    """Attention that never holds the scores."""
    return _MULTI_HEAD_ATTENTION(query, key, value, num_heads=heads)


def quick_gelu(x: Any) -> Any:
    """x · sigmoid(x), the SiLU."""
    return _QUICK_GELU(x, alpha=1.0)


def rotary(x: Any, cos: Any, sin: Any, heads: int) -> Any:
    """Rotation without scatter."""
    first = opset23.Constant(value=onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    return _ROTARY_EMBEDDING(x, first, cos, sin, interleaved=1, num_heads=heads)


def quantised_matmul(x: Any, values: Any, scales: Any, bits: int, block: int) -> Any:
    """A product with weights of few bits."""
    sizes = {"K": int(x.shape[-1]), "N": int(values.shape[0])}
    # Level 1: the product itself in float32.
    return _MATMUL_N_BITS(x, values, scales, bits=bits, block_size=block, accuracy_level=1, **sizes)


def standard_matmul(x: Any, values: Any, scales: Any, bias: Any = None, scale: Any = None, zero: Any = None) -> Any:
    """A product of 8-bit integers as the standard writes it: what is rounded is expanded before the product."""
    x = opset23.DequantizeLinear(opset23.QuantizeLinear(x, scale, zero), scale, zero)
    y = opset23.MatMul(x, expanded_weight(values, scales))
    return y if bias is None else opset23.Add(y, bias)


def standard_conv(
    x: Any,
    scale: Any,
    zero: Any,
    values: Any,
    scales: Any,
    bias: Any,
    output_scale: Any,
    output_zero: Any,
    padding: int,
) -> Any:
    """A convolution of 8-bit integers as the standard writes it."""
    kernel = opset23.DequantizeLinear(values, scales, axis=0)
    y = opset23.Conv(opset23.DequantizeLinear(x, scale, zero), kernel, bias, pads=[padding] * 4)
    return opset23.DequantizeLinear(opset23.QuantizeLinear(y, output_scale, output_zero), output_scale, output_zero)
