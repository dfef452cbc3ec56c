"""What becomes of operators that PyTorch has no translation of, in the words of the ONNX standard."""

from typing import Any

from onnxscript import opset23

__all__ = ["expanded_weight", "standard_attention"]


def standard_attention(query: Any, key: Any, value: Any, heads: int) -> Any:
    """`pyrexport::attention` as the standard's operator."""
    out, *_ = opset23.Attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)
    return out


def expanded_weight(values: Any, scales: Any) -> Any:
    """A matrix [in, out] of 8 bits, with a scale for each output channel."""
    return opset23.DequantizeLinear(values, scales, axis=1)
