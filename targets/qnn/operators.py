"""What PyTorch has no operators for: values rounded to 16 bits, and weights that the compiler takes as they are."""

from typing import Any

import onnx
import torch
from onnxscript import opset23

__all__ = [
    "channel_weight",
    "rounded_input",
    "rounded_output",
    "translated_input",
    "translated_output",
]

Tensor = torch.Tensor

FINER = 257
"""Steps of 16 bits in one of 8: 65,535 = 255 · 257, so that a range stays exactly what it is."""


@torch.library.custom_op("pyrexport::rounded_input16", mutates_args=())
def rounded_input(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x as integers of 16 bits hold it, by the scale and zero of those of 8 bits."""
    finer, middle = scale / FINER, zero.to(torch.int32) * FINER
    return ((torch.round(x / finer) + middle).clamp(0, 65535) - middle) * finer


@rounded_input.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


def translated_input(x: Any, scale: Any, zero: Any) -> Any:
    """What becomes of `rounded_input` in a graph; the constants are folded before it is compiled."""
    finer = opset23.Div(scale, opset23.Constant(value_float=float(FINER)))
    steps = opset23.Constant(value=onnx.helper.make_tensor("steps", onnx.TensorProto.INT32, [], [FINER]))
    wide = opset23.Mul(opset23.Cast(zero, to=onnx.TensorProto.INT32), steps)
    middle = opset23.Cast(wide, to=onnx.TensorProto.UINT16)
    return opset23.DequantizeLinear(opset23.QuantizeLinear(x, finer, middle), finer, middle)


@torch.library.custom_op("pyrexport::rounded_output16", mutates_args=())
def rounded_output(x: Tensor, bound: Tensor) -> Tensor:
    """x as integers of 16 bits around zero hold it, up to the greatest of some bounds."""
    scale = bound.max() / 32767
    return torch.round(x / scale).clamp(-32768, 32767) * scale


@rounded_output.register_fake
def _(x: Tensor, bound: Tensor) -> Tensor:
    return torch.empty_like(x)


def translated_output(x: Any, bound: Any) -> Any:
    """What becomes of `rounded_output` in a graph."""
    scale = opset23.Div(opset23.ReduceMax(bound, keepdims=0), opset23.Constant(value_float=32767.0))
    middle = opset23.Constant(value=onnx.helper.make_tensor("middle", onnx.TensorProto.UINT16, [], [32768]))
    return opset23.DequantizeLinear(opset23.QuantizeLinear(x, scale, middle), scale, middle)


@torch.library.custom_op("pyrexport::channel_weight8", mutates_args=())
def channel_weight(values: Tensor, scales: Tensor) -> Tensor:
    """A matrix [in, out] of 8 bits and a scale for each output channel."""
    return values.float() * scales


@channel_weight.register_fake
def _(values: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.float32)
