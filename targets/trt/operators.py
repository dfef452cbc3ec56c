"""What PyTorch has no operators for: values that are rounded to 8 bits, and weights that the engine expands."""

from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset23

from ..dialect import expand_blocks

__all__ = [
    "block_weight",
    "channel_weight",
    "restore_int4",
    "rounded",
    "rounded_value",
    "translated_block_weight",
]

Tensor = torch.Tensor
DOMAIN, INT4 = "pyrexport", "Int4Weight"


@torch.library.custom_op("pyrexport::rounded", mutates_args=())
def rounded(x: Tensor, scale: Tensor, floating: bool) -> Tensor:
    """x as 8 bits hold it: integers around zero, or floating-point numbers of four bits for the exponent."""
    steps = x.float() / scale.float()
    if floating:
        return (steps.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
    return (steps.round().clamp(-128, 127) * scale).to(x.dtype)


@rounded.register_fake
def _(x: Tensor, scale: Tensor, floating: bool) -> Tensor:
    return torch.empty_like(x)


def rounded_value(x: Any, scale: Any, floating: bool) -> Any:
    """What becomes of `rounded` in a graph."""
    kind = onnx.TensorProto.FLOAT8E4M3FN if floating else onnx.TensorProto.INT8
    zero = opset23.Constant(value=onnx.helper.make_tensor("zero", kind, [], [0]))
    return opset23.DequantizeLinear(opset23.QuantizeLinear(x, scale, zero), scale)


@torch.library.custom_op("pyrexport::channel_weight", mutates_args=())
def channel_weight(values: Tensor, scales: Tensor) -> Tensor:
    """A matrix [in, out] of 8 bits and a scale for each output channel, in the type of the scales."""
    return (values.float() * scales.float()).to(scales.dtype)


@channel_weight.register_fake
def _(values: Tensor, scales: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=scales.dtype)


@torch.library.custom_op("pyrexport::block_weight", mutates_args=())
def block_weight(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Signed blocks of 4 bits [out, in / block, bytes of a block] as a matrix [out, in], in the type of the scales."""
    return expand_blocks(values, scales.float(), 4, signed=True).to(scales.dtype)


@block_weight.register_fake
def _(values: Tensor, scales: Tensor, block: int) -> Tensor:
    return values.new_empty(values.shape[0], values.shape[1] * block, dtype=scales.dtype)


def _int4_weight() -> Any:
    kinds = {"B": ["tensor(uint8)"], "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]}
    schema = OpSchema(
        INT4,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("values", "B"), OpSchema.FormalParameter("scales", "T")],
        outputs=[OpSchema.FormalParameter("weight", "T")],
        type_constraints=[(kind, allowed, "") for kind, allowed in kinds.items()],
        attributes=[OpSchema.Attribute("block", OpSchema.AttrType.INT, required=True)],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), INT4, schema)


_INT4_WEIGHT = _int4_weight()


def translated_block_weight(values: Any, scales: Any, block: int) -> Any:
    """What becomes of `block_weight` in a graph, as long as its values are bytes."""
    return _INT4_WEIGHT(values, scales, block=block)


def restore_int4(model: ir.Model) -> None:
    """Let weights of 4 bits be of the type that they are, two values a byte: the exporter knows bytes alone."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != (DOMAIN, INT4):
            continue
        (values, scales), block = node.inputs, node.attributes["block"].as_int()
        assert values is not None
        assert scales is not None
        assert values.shape is not None
        out, blocks, _ = values.shape.numpy()
        values.dtype, values.shape = ir.DataType.INT4, ir.Shape((out, blocks * block))
        scales.shape = ir.Shape((out, blocks))
        node.domain, node.op_type = "", "DequantizeLinear"
        node.attributes.clear()
        for name, value in (("axis", 1), ("block_size", block)):
            node.attributes[name] = ir.AttrInt64(name, value)
    model.opset_imports.pop(DOMAIN, None)
