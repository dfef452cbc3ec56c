"""Building blocks for ONNX Runtime, which has an operator for each, and for providers with the standard's alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...runtime.quantisation import Scheme
from ..dialect import Dialect, attention, expand_blocks
from ..operators import standard_attention
from .operators import (
    integer_conv,
    integer_matmul,
    multi_head_attention,
    quantise,
    quantised_matmul,
    quick_gelu,
    rotary,
    standard_conv,
    standard_matmul,
)
from .passes import expand_late

__all__ = ["DIALECTS", "FUSED"]

Tensor = torch.Tensor


@torch.library.custom_op("pyrexport::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate pairs of neighbouring channels of each head: x [B, N, heads·size], cos and sin [N, size/2]."""
    a, b = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(2)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pyrexport::silu", mutates_args=())
def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return torch.nn.functional.silu(x)


@silu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pyrexport::quantised_product", mutates_args=())
def quantised_product(x: Tensor, values: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """Product of x [..., in] and a matrix in blocks, which the engine never holds in float32 as a whole."""
    return x @ expand_blocks(values, scales, bits)[:, : x.shape[-1]].T


@quantised_product.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("pyrexport::integer_product", mutates_args=())
def integer_product(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Product of x [..., in], rounded to 8 bits, and int8 values [in, out]; see `Dialect.integer_product`."""
    return Dialect().integer_product(x, values, scales, bias, scale, zero)


@integer_product.register_fake
def _(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[1])


@torch.library.custom_op("pyrexport::rounded_integers", mutates_args=())
def rounded_integers(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x as uint8; see `Dialect.rounded_integers`."""
    return Dialect().rounded_integers(x, scale, zero)


@rounded_integers.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("pyrexport::integer_convolution", mutates_args=())
def integer_convolution(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor,
    output_scale: Tensor,
    output_zero: Tensor,
    padding: int,
) -> Tensor:
    """A convolution that keeps the size; see `Dialect.integer_convolution`."""
    return Dialect().integer_convolution(x, (scale, zero), values, scales, bias, (output_scale, output_zero), padding)


@integer_convolution.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor,
    output_scale: Tensor,
    output_zero: Tensor,
    padding: int,
) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0], *x.shape[2:], dtype=torch.float32)


class Integers(Dialect):
    """An operator each for what is computed in integers."""

    def integer_product(
        self,
        x: Tensor,
        values: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        bound: Tensor | None = None,
    ) -> Tensor:
        """The product in integers."""
        return integer_product(x, values, scales, bias, scale, zero)

    def rounded_integers(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The integers by one operator."""
        return rounded_integers(x, scale, zero)

    def integer_convolution(
        self,
        x: Tensor,
        given: tuple[Tensor, Tensor],
        values: Tensor,
        scales: Tensor,
        bias: Tensor,
        made: tuple[Tensor, Tensor],
        padding: int,
    ) -> Tensor:
        """The convolution in integers."""
        return integer_convolution(x, *given, values, scales, bias, *made, padding)


class Fused(Integers):
    """One operator for attention, rotation and products with blocks: those of ONNX Runtime's own kernels."""

    domains = {"com.microsoft": 1}  # noqa: RUF012
    operators = {  # noqa: RUF012
        torch.ops.pyrexport.attention.default: multi_head_attention,
        torch.ops.pyrexport.rotary_embedding.default: rotary,
        torch.ops.pyrexport.silu.default: quick_gelu,
        torch.ops.pyrexport.quantised_product.default: quantised_matmul,
        torch.ops.pyrexport.integer_product.default: integer_matmul,
        torch.ops.pyrexport.rounded_integers.default: quantise,
        torch.ops.pyrexport.integer_convolution.default: integer_conv,
    }
    feed_forward_bytes = 64 * 1024 * 1024
    most_pieces = 1024
    minimal_filtering = True
    silu = staticmethod(silu)  # one operator, which ONNX Runtime would have to find

    def block_product(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
        """The product as one operator."""
        y = quantised_product(x, values, scales, scheme.bits, scheme.block)
        return y if bias is None else y + bias

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        """The rotation as one operator."""
        return lambda x, cos, sin: rotary_embedding(x, cos, sin, heads)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        """The mean as a matrix product: of one frame it takes half the time of a reduction."""
        return lambda x: (x.new_full((1, channels), 1 / channels) @ x.flatten(2)).reshape(len(x), 1, *x.shape[2:])

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attention as one operator that never holds the scores."""
        return attention(query, key, value, heads)

    def finish(self, model: Any) -> None:
        """Weights of 16 bits are expanded block by block."""
        expand_late(model.graph)


class Standard(Integers):
    """Operators of the ONNX standard alone; its attention is one, whose scores an engine need not hold."""

    operators = {  # noqa: RUF012
        torch.ops.pyrexport.attention.default: standard_attention,
        torch.ops.pyrexport.integer_product.default: standard_matmul,
        torch.ops.pyrexport.rounded_integers.default: quantise,
        torch.ops.pyrexport.integer_convolution.default: standard_conv,
    }
    feed_forward_bytes = Fused.feed_forward_bytes
    most_pieces = Fused.most_pieces

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attention as one operator."""
        return attention(query, key, value, heads)


class Plain(Dialect):
    """The standard before it had operators for attention and norms, which plug-ins know the parts of."""

    opset = 20


FUSED = Fused()

DIALECTS: Mapping[str, Dialect] = {"fused": FUSED, "standard": Standard(), "plain": Plain()}
"""By the names that providers have for them."""
