"""How graphs are written: the building blocks that engines want in different words.

`Dialect` itself writes them in plain operators that every exporter translates. A target's own dialect replaces those
for which its engine has something better; all are the same functions up to the order of float32 sums.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..runtime.quantisation import Scheme

__all__ = [
    "Dialect",
    "attention",
    "attention_in_pieces",
    "by_heads",
    "expand_blocks",
    "gelu_by_sigmoid",
    "rounded_input",
]

Tensor = torch.Tensor


class Dialect:
    """Makes the building blocks of graphs."""

    opset: int = 23
    """Version of the ONNX standard's operators."""
    operators: Mapping[Any, Callable[..., Any]] = {}
    """What custom operators of PyTorch become in an ONNX graph."""
    domains: Mapping[str, int] = {}
    """Versions of the other domains that these are of."""
    transposed: bool = True
    """Matrices are stored as [in, out], in place of the checkpoint's [out, in]."""
    precise: bool = False
    """What acts on all tokens alike, and the first and the last layer, are stored in float32 whatever the scheme."""
    typed_scales: bool = False
    """Scales of integers are stored in the type of the weights that are none."""
    symmetric: bool = False
    """Integers of a product's input are those of all stages, around zero."""
    bounded: bool = False
    """Products of integers are rounded too: each is told what the magnitude of its output channels cannot exceed."""
    folds: bool = False
    """The compiler stores what depends on no input, however large it is."""
    feed_forward_bytes: int | None = None
    """Most that the feed-forward's hidden activation takes, which is made in pieces of tokens: in one, stage 0 of
    Wan2.1-1.3B at 81x448x832 would take 1.1 GB. None: in one."""
    most_inputs: int | None = None
    """Most input channels of a product in floats, a sum of several where there are more; not of `transposed` ones."""
    minimal_filtering: bool = False
    """Sums of frames and kernels save convolutions; their rounding is a few times as large: for engines in float32."""
    most_pieces: int = 1
    """Most pieces that it is made in, however large they become."""
    silu: Callable[[Tensor], Tensor] = staticmethod(nn.functional.silu)
    """x · sigmoid(x)."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Product of x […, in] and a matrix, which is stored as `transposed` says."""
        y = torch.matmul(x, weight.float())
        return y if bias is None else y + bias

    def block_product(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
        """Product of x […, in] and a matrix in blocks [out, in / block, bytes of a block], with a scale for each."""
        weight = expand_blocks(values, scales, scheme.bits, signed=scheme.signed)[:, : x.shape[-1]]
        x = rounded_input(x) if scheme.activations else x
        return nn.functional.linear(x, weight, bias)

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
        """Product of x […, in], rounded to 8 bits, and a matrix of integers, stored as `transposed` says.

        Args:
            x: […, in].
            values: int8, or floating-point numbers of 8 bits.
            scales: of each output channel [out].
            bias: [out].
            scale, zero: of the integers of x, uint8 from the zero; None: by the range of x itself. Where they are
                `symmetric`, there is a scale alone.
            bound: of the magnitude of each output channel [out], where they are `bounded`.
        """
        weight = values.float() * scales if self.transposed else (values.float() * scales[:, None]).T
        y = torch.matmul(rounded_input(x, scale, zero), weight)
        return y if bias is None else y + bias

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """A 2-D convolution, its output in float32."""
        return nn.functional.conv2d(x, weight.float(), bias, padding=padding)

    def rounded_integers(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x as 8-bit integers, uint8, by a scale and a zero."""
        return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)

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
        """A 2-D convolution of integers, its output rounded to 8 bits.

        Args:
            x: uint8 [n, in, H, W].
            given: scale and zero of x, float32 and uint8.
            values: int8 [out, in, kh, kw].
            scales: of each output channel [out].
            bias: [out].
            made: scale and zero of the output.
            padding: rows and columns around x.
        """
        (scale, zero), (output_scale, output_zero) = given, made
        weight = values.float() * scales.view(-1, 1, 1, 1)
        y = nn.functional.conv2d((x.float() - zero) * scale, weight, bias, padding=padding)
        return rounded_input(y, output_scale, output_zero)

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """`norm(x, weight=None, bias=None)` over the last axis."""

        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return nn.functional.layer_norm(x, (width,), weight, bias, eps)

        return norm

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """`norm(x, weight)` over the last axis."""
        return lambda x, weight: nn.functional.rms_norm(x, (width,), weight, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        """Mean over axis 1 of [n, C, H, W], kept."""
        return lambda x: x.mean(dim=1, keepdim=True)

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        """`rotate(x, cos, sin)`: neighbouring channels of each head of x [1, N, heads·size], tables [N, size/2]."""

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            pairs = x.reshape(1, -1, heads, size // 2, 2)
            a, b, c, s = pairs[..., 0], pairs[..., 1], cos[None, :, None], sin[None, :, None]
            return torch.stack((a * c - b * s, a * s + b * c), dim=-1).reshape(x.shape)

        return rotate

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        """`bias(table, length)`: a table [count, heads] to the bias [heads, L, L] of buckets [L, L]."""
        return _Buckets(buckets)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""
        return nn.functional.gelu(x, approximate="tanh")

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Softmax attention without a mask, [1, N, heads·size] each."""
        q, k, v = (by_heads(x, heads) for x in (query, key, value))
        return _attend(q * q.shape[2] ** -0.5, k.transpose(1, 2), v).transpose(0, 1).reshape(query.shape)

    def doubling(self) -> Callable[[Tensor], Tensor]:
        """Nearest-neighbour resize of [n, C, H, W] to [n, C, 2H, 2W]."""
        return lambda x: nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")

    def finish(self, model: Any) -> None:
        """Change an exported `onnx_ir.Model` last of all, as the engine's order of evaluation asks for."""
        return


def rounded_input(x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """x as 8-bit integers hold it, by a given scale and zero, or those of ONNX's `DynamicQuantizeLinear`."""
    if scale is not None and zero is not None:
        return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / scale).clamp(0, 255)
    integers = (torch.round(x / scale) + zero).clamp(0, 255)
    return (integers - zero) * scale


def attention_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, heads: int, room: int, nbytes: int, most: int | None = None
) -> Tensor:
    """Softmax attention, [1, N, heads·size] each, whose scores are made in pieces where they would be large.

    Args:
        query, key, value: of so many heads.
        heads: number of heads.
        room: bytes that scores may take at once; where all do not fit, a head at a time, its queries in pieces.
        nbytes: bytes of a score.
        most: pieces of a head at most, however large they become.
    """
    q, k, v = (by_heads(x, heads) for x in (query, key, value))
    q, k = q * q.shape[2] ** -0.5, k.transpose(1, 2)
    tokens, row = q.shape[1], nbytes * k.shape[2]
    if heads * tokens * row <= room:
        out = _attend(q, k, v)
    else:  # engines pack keys and values again for each piece
        least = min(-(-tokens * row // room), most or tokens)
        count = next((count for count in range(least, 2 * least) if tokens % count == 0), least)
        step = -(-tokens // count)
        one = zip(_cut(q, 1, 0), _cut(k, 1, 0), _cut(v, 1, 0), strict=True)
        out = _joined([_joined([_attend(piece, k, v) for piece in _cut(q, step, 1)], 1) for q, k, v in one], 0)
    return out.transpose(0, 1).reshape(query.shape)


def _cut(x: Tensor, size: int, axis: int) -> list[Tensor]:
    """Pieces of a size along one of the first two axes; what is one piece is itself: a cut of all would be a copy."""
    if x.shape[axis] <= size:
        return [x]
    starts = range(0, x.shape[axis], size)
    return [x[start : start + size] if axis == 0 else x[:, start : start + size] for start in starts]


def _joined(pieces: list[Tensor], axis: int) -> Tensor:
    return torch.cat(pieces, dim=axis) if len(pieces) > 1 else pieces[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q, k), dim=-1), v)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU in its tanh form, x/2 (1 + tanh(u)), as x · sigmoid(2u): in fewer passes."""
    twice = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (twice + (twice * 0.044715) * (x * x)))


def by_heads(x: Tensor, heads: int) -> Tensor:
    """x [1, N, heads·size] as [heads, N, size]."""
    return x.reshape(x.shape[1], heads, -1).transpose(0, 1)


def expand_blocks(values: Tensor, scales: Tensor, bits: int, *, signed: bool = False) -> Tensor:
    """A matrix [out, in, padded to whole blocks] in float32 from blocks that are symmetric around half the range, or,
    signed, around zero in two's complement.
    """
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(2)
    half = 2 ** (bits - 1)
    values = values ^ half if signed else values
    expanded: Tensor = (values.float() - half) * scales.view(*values.shape[:2], 1)
    return expanded.flatten(1)


class _Buckets(nn.Module):
    def __init__(self, buckets: Tensor) -> None:
        super().__init__()
        self.register_buffer("buckets", buckets.to(torch.int32), persistent=False)

    def forward(self, table: Tensor, length: int) -> Tensor:
        return nn.functional.embedding(self.buckets, table).permute(2, 0, 1)  # type: ignore[arg-type]


@torch.library.custom_op("pyrexport::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention without a mask, [B, N, heads·size] each, for engines with one operator that holds no scores."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    return torch.empty_like(query)
