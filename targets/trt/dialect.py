"""Building blocks for a compiler that takes every type from the graph.

Matrix products, convolutions and attention run in the type that their weights are stored in. What would lose too much
there stays in float32: norms, rotation, modulation and the residual stream, and the few small matrices that act on all
tokens alike (`Dialect.precise`), as diffusers keeps them too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...runtime.quantisation import Scheme
from ..dialect import Dialect, attention
from ..operators import expanded_weight, standard_attention
from .operators import (
    block_weight,
    channel_weight,
    restore_int4,
    rounded,
    rounded_value,
    translated_block_weight,
)

__all__ = ["TYPED"]

Tensor = torch.Tensor


class Typed(Dialect):
    """Building blocks whose types are those of the weights, or float32."""

    operators = {  # noqa: RUF012
        torch.ops.pyrexport.attention.default: standard_attention,
        torch.ops.pyrexport.rounded.default: rounded_value,
        torch.ops.pyrexport.channel_weight.default: expanded_weight,
        torch.ops.pyrexport.block_weight.default: translated_block_weight,
    }
    precise = True
    typed_scales = True
    symmetric = True
    folds = True

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product in the type of the weight."""
        y = torch.matmul(x.to(weight.dtype), weight)
        return y if bias is None else y + bias.to(weight.dtype)

    def block_product(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
        """The product in the type of the scales, its weight expanded by the engine."""
        y = torch.matmul(x.to(scales.dtype), block_weight(values, scales, scheme.block).T)
        return y if bias is None else y + bias.to(scales.dtype)

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
        """The product in integers, or floats of 8 bits, around zero; its output is in the type of the scales."""
        assert scale is not None
        given = rounded(x.to(scales.dtype), scale, values.dtype.is_floating_point)
        y = torch.matmul(given, channel_weight(values, scales))
        return y if bias is None else y + bias.to(scales.dtype)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """The convolution in the type of the kernel, its output in float32."""
        own = None if bias is None else bias.to(weight.dtype)
        return nn.functional.conv2d(x.to(weight.dtype), weight, own, padding=padding).float()

    def layer_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """The norm in float32."""

        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return nn.functional.layer_norm(x.float(), (width,), weight, bias, eps)

        return norm

    def rms_norm(self, width: int, eps: float) -> Callable[..., Tensor]:
        """The norm in float32."""
        return lambda x, weight: nn.functional.rms_norm(x.float(), (width,), weight, eps)

    def channel_mean(self, channels: int) -> Callable[[Tensor], Tensor]:
        """The mean as a sum that is divided."""
        # TensorRT takes a mean for a part of a layer norm, in an order of chance: no two engines would be the same.
        return lambda x: x.sum(dim=1, keepdim=True) * (1 / channels)

    def bucket_bias(self, buckets: Tensor, count: int) -> Callable[[Tensor, int], Tensor]:
        """The bias of a corner of the longest length's buckets."""
        return _Buckets(buckets)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attention as one operator, in the type of the values."""
        return attention(query.to(value.dtype), key.to(value.dtype), value, heads)

    def finish(self, model: Any) -> None:
        """Weights of 4 bits get their own type, which PyTorch does not have."""
        restore_int4(model)


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


TYPED = Typed()
