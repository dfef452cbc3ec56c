"""The building blocks for compilers that take every type from the graph (TensorRT).

Matrix products, convolutions and attention run in the type that their weights are stored in. What would lose too much
there stays in float32: norms, rotation, modulation and the residual stream, and the few small matrices that act on all
tokens alike (`Dialect.precise`), as diffusers keeps them too.
"""

from collections.abc import Callable

import torch
from torch import nn

from .dialects import Dialect, attention

__all__ = ["TYPED"]

Tensor = torch.Tensor


class _Typed:
    transposed, precise, folds, packed = True, True, True, True
    feed_forward_bytes: int | None = None
    most_pieces = 1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.matmul(x.to(weight.dtype), weight)
        return y if bias is None else y + bias.to(weight.dtype)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        own = None if bias is None else bias.to(weight.dtype)
        return nn.functional.conv2d(x.to(weight.dtype), weight, own, padding=padding).float()

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return nn.functional.layer_norm(x.float(), (width,), weight, bias, eps)

        return norm

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        return lambda x, weight: nn.functional.rms_norm(x.float(), (width,), weight, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        # TensorRT takes a mean for a part of a layer norm, in an order of chance: no two engines would be the same.
        return lambda x: x.sum(dim=1, keepdim=True) * (1 / channels)

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            pairs = x.reshape(1, -1, heads, size // 2, 2)
            a, b, c, s = pairs[..., 0], pairs[..., 1], cos[None, :, None], sin[None, :, None]
            return torch.stack((a * c - b * s, a * s + b * c), dim=-1).reshape(x.shape)

        return rotate

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        return _Buckets(buckets)

    def gelu(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return attention(query.to(value.dtype), key.to(value.dtype), value, heads)

    def doubling(self) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class _Buckets(nn.Module):
    """The corner of the longest length's buckets: a pair's bucket depends on its distance alone."""

    def __init__(self, buckets: Tensor) -> None:
        super().__init__()
        # One longer than any length: the exporter asks whether a corner is the whole, and a symbol has no answer.
        padded = nn.functional.pad(buckets.to(torch.int32), (0, 1, 0, 1))
        self.register_buffer("buckets", padded, persistent=False)

    def forward(self, table: Tensor, length: int) -> Tensor:
        corner: Tensor = self.buckets[:length, :length]  # type: ignore[index]
        return nn.functional.embedding(corner, table).permute(2, 0, 1)


TYPED: Dialect = _Typed()
