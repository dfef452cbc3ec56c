"""The building blocks of the graphs that engines want written differently.

`FUSED` is for an engine with an operator for each (ONNX Runtime). `PORTABLE` writes the same functions with matrix
products, elementwise operators and moves of at most six axes, which XNNPACK takes as one piece. Both are exact up to the
order of float32 sums. `TYPED`, in a module of its own, is for compilers that take every type from the graph.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

__all__ = ["FUSED", "PORTABLE", "Dialect"]

SCORES_BYTES = 512 * 1024 * 1024
"""Most that attention scores may take at once where no operator avoids holding them."""

Tensor = torch.Tensor


class Dialect(Protocol):
    """Makes building blocks."""

    transposed: bool
    """Matrices are stored as [in, out], in place of the checkpoint's [out, in]."""
    precise: bool
    """What acts on all tokens alike, and the first and the last layer, are stored in float32 whatever the precision."""
    folds: bool
    """The compiler stores what depends on no input, however large it is."""
    packed: bool
    """The decoder's frames and caches are one flat tensor: TensorRT orders outputs by chance, and no two engines would be the
    same."""
    feed_forward_bytes: int | None
    """Of the feed-forward's hidden activation, which is made in pieces of tokens: in one, stage 0 of Wan2.1-1.3B at 81x448x832 would
    take 1.1 GB. None: in one."""
    most_pieces: int
    """That it is made in, however large they become."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x […, in] by a matrix as `transposed` says."""
        ...

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """A 2-D convolution, its output in float32."""
        ...

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """`norm(x, weight=None, bias=None)` over the last axis."""
        ...

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """`norm(x, weight)` over the last axis."""
        ...

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        """Mean over axis 1 of [n, C, H, W], kept."""
        ...

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        """`rotate(x, cos, sin)`: pairs of neighbouring channels of each head of x [1, N, heads·size], tables [N, size/2]."""
        ...

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        """`bias(table, length)`: a table [count, heads] to the bias [heads, L, L] of buckets [L, L]."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """The tanh form."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Softmax attention without a mask, [1, N, heads·size] each."""
        ...

    def doubling(self) -> Callable[[Tensor], Tensor]:
        """[n, C, H, W] to [n, C, 2H, 2W], nearest."""
        ...


class _Fused:
    transposed, precise, folds, packed = True, False, False, False
    feed_forward_bytes: int | None = 64 * 1024 * 1024
    most_pieces = 1024

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.matmul(x, weight.float())
        return y if bias is None else y + bias

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        return nn.functional.conv2d(x, weight.float(), bias, padding=padding)

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return nn.functional.layer_norm(x, (width,), weight, bias, eps)

        return norm

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        return lambda x, weight: nn.functional.rms_norm(x, (width,), weight, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.mean(dim=1, keepdim=True)

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        return lambda x, cos, sin: rotary_embedding(x, cos, sin, heads)

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        return _Buckets(buckets)

    def gelu(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return attention(query, key, value, heads)

    def doubling(self) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class _Portable:
    transposed, precise, folds, packed = False, False, False, False
    feed_forward_bytes: int | None = 16 * 1024 * 1024  # six operators pass over it, better in the cache than in memory
    most_pieces = 16  # every operator of every piece is lowered by itself

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight.float(), bias)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        return nn.functional.conv2d(x, weight.float(), bias, padding=padding)

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        return _LayerNorm(width, eps)

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        return _RMSNorm(width, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        return _ChannelMean(channels)

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        return _Rotation(heads, size)

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        return _OneHot(buckets, count)

    def gelu(self, x: Tensor) -> Tensor:
        # XNNPACK has one GELU, with erf, and takes the tanh form for it. (1 + tanh(u)) / 2 is sigmoid(2u), in fewer passes.
        twice = 2 * math.sqrt(2 / math.pi)
        return x * torch.sigmoid(x * (twice + (twice * 0.044715) * (x * x)))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        q, k, v = (_heads(x, heads) for x in (query, key, value))
        q, k = q * q.shape[2] ** -0.5, k.transpose(1, 2)
        tokens, row = q.shape[1], 4 * k.shape[2]
        if heads * tokens * row <= SCORES_BYTES:
            out = torch.bmm(torch.softmax(torch.bmm(q, k), dim=-1), v)
        else:  # a head at a time: the engine packs keys and values again for each piece
            step = -(-tokens // max(1, math.ceil(tokens * row / SCORES_BYTES)))
            out = torch.cat([_attend(q[h : h + 1], k[h : h + 1], v[h : h + 1], step) for h in range(heads)], dim=0)
        return out.transpose(0, 1).reshape(query.shape)

    def doubling(self) -> Callable[[Tensor], Tensor]:
        return _Doubling()


def _heads(x: Tensor, heads: int) -> Tensor:
    """[1, N, heads·size] to [heads, N, size]."""
    return x.reshape(x.shape[1], heads, -1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, step: int) -> Tensor:
    """One head [1, N, size], `step` queries at a time."""
    if step == q.shape[1]:
        return torch.bmm(torch.softmax(torch.bmm(q, k), dim=-1), v)
    return torch.cat(
        [_attend(part, k, v, part.shape[1]) for part in (q[:, i : i + step] for i in range(0, q.shape[1], step))], dim=1
    )


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
    """A convolution of one output channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("share", torch.full((1, channels, 1, 1), 1 / channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.share)  # type: ignore[arg-type]


class _Doubling(nn.Module):
    """Every pixel times a square of ones."""

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


class _Buckets(nn.Module):
    def __init__(self, buckets: Tensor) -> None:
        super().__init__()
        self.register_buffer("buckets", buckets.to(torch.int32), persistent=False)

    def forward(self, table: Tensor, length: int) -> Tensor:
        return nn.functional.embedding(self.buckets, table).permute(2, 0, 1)  # type: ignore[arg-type]


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


@torch.library.custom_op("pyrexport::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention without a mask, [B, N, heads·size] each: engines have it as one operator that never holds the scores."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("pyrexport::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate pairs of neighbouring channels of each head: x [B, N, heads·size], cos and sin [N, size/2]."""
    a, b = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(2)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


FUSED: Dialect = _Fused()
PORTABLE: Dialect = _Portable()
