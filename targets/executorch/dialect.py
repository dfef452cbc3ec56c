"""Building blocks for XNNPACK, exact up to the order of float32 sums."""

from collections.abc import Callable

import torch
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (defines the operators)

from ...runtime.quantisation import Scheme
from ..dialect import Dialect, attention_in_pieces, gelu_by_sigmoid

__all__ = ["FOLDED", "PORTABLE"]

SCORES_BYTES = 160 * 1024 * 1024
"""Most that attention scores may take at once where no operator avoids holding them."""

INTEGERS = -128, 127, torch.int8
"""Least and largest of the integers of inputs and of channels."""

Tensor = torch.Tensor
quantised = torch.ops.quantized_decomposed


class Portable(Dialect):
    """Matrix products, elementwise operators and moves of at most six axes, which XNNPACK takes as one piece."""

    transposed = False
    feed_forward_bytes = 16 * 1024 * 1024  # six operators pass over it, better in the cache than in memory
    # XNNPACK goes through all input channels of a few columns at a time, which then have to stay in the second cache: a
    # product of 8,960 channels takes twice as long as two of 4,480.
    most_inputs = 4480
    most_pieces = 16  # every operator of every piece is lowered by itself

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product as a linear layer."""
        return nn.functional.linear(x, weight.float(), bias)

    def block_product(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
        """The product in integers, those of each token by its own range."""
        integers, factors = expanded_blocks(values, scales)
        zeros, limits = zero_points(factors), (-8, 7, torch.int8)
        weight = quantised.dequantize_per_channel_group(integers, factors, zeros, *limits, scheme.block, torch.float32)
        return nn.functional.linear(_rounded_tokens(x), weight, bias)

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
        """The product in integers, those of each token by its own range."""
        weight = quantised.dequantize_per_channel(values, scales, zero_points(scales), 0, *INTEGERS)
        return nn.functional.linear(_rounded_tokens(x), weight, bias)

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """A norm of matrix products and elementwise operators."""
        return _LayerNorm(width, eps)

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """A norm of matrix products and elementwise operators."""
        return _RMSNorm(width, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        """The mean as a convolution of one output channel."""
        return _ChannelMean(channels)

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        """The rotation as matrix products."""
        return _Rotation(heads, size)

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        """The bias as rows of the table, taken by a matrix product."""
        return _OneHot(buckets, count)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form, from a sigmoid."""
        # XNNPACK has one GELU, with erf, and takes the tanh form for it.
        return gelu_by_sigmoid(x)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attention whose scores are made in pieces where they would be large."""
        return attention_in_pieces(query, key, value, heads, SCORES_BYTES, 4)

    def doubling(self) -> Callable[[Tensor], Tensor]:
        """The resize as every pixel times a square of ones."""
        return _Doubling()


def _rounded_tokens(x: Tensor) -> Tensor:
    """x as 8-bit integers hold it, each token by its own range, as XNNPACK rounds the input of a product."""
    scale, zero = quantised.choose_qparams_per_token_asymmetric(x, torch.int8)
    integers = quantised.quantize_per_token(x, scale, zero, *INTEGERS)
    rounded: Tensor = quantised.dequantize_per_token(integers, scale, zero, *INTEGERS, x.dtype)
    return rounded


@torch.library.custom_op("pyrexport::zero_points", mutates_args=())
def zero_points(scales: Tensor) -> Tensor:
    """Zeros for scales, which XNNPACK asks for."""
    return torch.zeros(scales.shape, dtype=torch.int64)


@zero_points.register_fake
def _(scales: Tensor) -> Tensor:
    return torch.empty_like(scales, dtype=torch.int64)


@torch.library.custom_op("pyrexport::expanded_blocks", mutates_args=())
def expanded_blocks(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 4 bits [out, in / block, bytes of a block] as int8 [out, in], and their scales [out, in / block]."""
    integers = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).to(torch.int8) - 8
    return integers, scales.float().view(values.shape[:2]).clone()


@expanded_blocks.register_fake
def _(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    integers = values.new_empty(values.shape[0], 2 * values[0].numel(), dtype=torch.int8)
    return integers, values.new_empty(values.shape[:2], dtype=torch.float32)


FOLDED = (torch.ops.pyrexport.zero_points.default, torch.ops.pyrexport.expanded_blocks.default)
"""What only depends on weights, and is computed when a program is lowered."""


class _Mean(nn.Module):
    """Mean over the last axis, kept, as a matrix product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((1, width), 1 / width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.share)  # type: ignore[arg-type]


class _LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.mean, self.eps = _Mean(width), eps

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x - self.mean(x)
        x = x * torch.rsqrt(self.mean(x * x) + self.eps)
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


class _RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.mean, self.eps = _Mean(width), eps

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * weight


class _ChannelMean(nn.Module):
    """Mean over the channels, kept, as a convolution of one output channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((1, channels, 1, 1), 1 / channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.share)  # type: ignore[arg-type]


class _Doubling(nn.Module):
    """Twice the size: every pixel times a square of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.ones(1, 2, 1, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        doubled: Tensor = x.reshape(n * c * h, 1, w, 1) * self.square  # type: ignore[operator]
        return doubled.reshape(n, c, 2 * h, 2 * w)


class _Rotation(nn.Module):
    """`x · cos + turn(x) · sin`: turning and repeating are products with matrices of 0, 1 and -1, exact in float32."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.shape = heads, size
        turn, repeat = torch.zeros(size, size), torch.zeros(size, size // 2)
        even = torch.arange(0, size, 2)
        turn[even, even + 1], turn[even + 1, even] = -1.0, 1.0
        repeat[even, even // 2] = repeat[even + 1, even // 2] = 1.0
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("repeat", repeat, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = x.shape[1]
        by_head = x.reshape(tokens, *self.shape)
        cos, sin = (nn.functional.linear(t, self.repeat).reshape(tokens, 1, -1) for t in (cos, sin))  # type: ignore[arg-type]
        return (by_head * cos + nn.functional.linear(by_head, self.turn) * sin).reshape(x.shape)  # type: ignore[arg-type]


class _OneHot(nn.Module):
    """Rows of the table by a matrix product."""

    def __init__(self, buckets: Tensor, count: int) -> None:
        super().__init__()
        one_hot = nn.functional.one_hot(buckets.long().flatten(), count).float()
        self.length = buckets.shape[0]
        self.register_buffer("one_hot", one_hot.T.contiguous(), persistent=False)

    def forward(self, table: Tensor, length: int) -> Tensor:
        bias = torch.matmul(table.transpose(0, 1), self.one_hot)  # type: ignore[arg-type]
        return bias.reshape(-1, self.length, self.length)


PORTABLE = Portable()
