"""Building blocks that the tensor processor takes as one piece."""

from collections.abc import Callable

import torch
from torch import nn

from ..dialect import Dialect, attention_in_pieces, gelu_by_sigmoid
from ..operators import expanded_weight
from .operators import (
    channel_weight,
    rounded_input,
    rounded_output,
    translated_input,
    translated_output,
)

__all__ = ["HEXAGON"]

SCORES_BYTES = 4 * 1024 * 1024
"""Most that the scores of a block of queries take, in 16 bits: about half of the tightly coupled memory."""

MOST_BLOCKS = 32
"""Most blocks that the queries of a head are cut into, however large these become: each is compiled by itself."""

Tensor = torch.Tensor


class Hexagon(Dialect):
    """Operators of the ONNX standard on at most five axes, and no contrib operators, which would stay on the CPU."""

    operators = {  # noqa: RUF012
        torch.ops.pyrexport.rounded_input16.default: translated_input,
        torch.ops.pyrexport.rounded_output16.default: translated_output,
        torch.ops.pyrexport.channel_weight8.default: expanded_weight,
    }
    bounded = True
    # A product of 30,576 tokens and 8,960 channels is refused; one of 5,760 compiles.
    feed_forward_bytes = 256 * 1024 * 1024
    most_pieces = 16

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
        """The product of integers of 16 and 8 bits, itself rounded to 16; the bias is added in floating point."""
        assert scale is not None
        assert zero is not None
        assert bound is not None
        y = torch.matmul(rounded_input(x, scale, zero), channel_weight(values, scales))
        y = rounded_output(y, bound)
        return y if bias is None else y + bias

    def rotation(self, heads: int, size: int) -> Callable[..., Tensor]:
        """The rotation as products with matrices of 0, 1 and -1."""
        # The standard's RotaryEmbedding fails at 1,536 channels, and slices of pairs take fifteen times as long.
        return _Rotation(heads, size)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form, from a sigmoid: the operator of its own is off by a fifth of a stage's whole error."""
        return gelu_by_sigmoid(x)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attention in blocks of queries, a head at a time where the scores of all would not stay near the units."""
        return attention_in_pieces(query, key, value, heads, SCORES_BYTES, 2, MOST_BLOCKS)


class _Rotation(nn.Module):
    """`x · cos + turn(x) · sin`."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.shape = heads, size
        turn, repeat = torch.zeros(size, size), torch.zeros(size // 2, size)
        even = torch.arange(0, size, 2)
        turn[even + 1, even], turn[even, even + 1] = -1.0, 1.0
        repeat[even // 2, even] = repeat[even // 2, even + 1] = 1.0
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("repeat", repeat, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        by_head = x.reshape(-1, *self.shape)
        cos, sin = (torch.matmul(table, self.repeat).unsqueeze(1) for table in (cos, sin))  # type: ignore[arg-type]
        return (by_head * cos + torch.matmul(by_head, self.turn) * sin).reshape(x.shape)  # type: ignore[arg-type]


HEXAGON = Hexagon()
