"""The UMT5 encoder as a graph over embeddings, at one static length.

The embedding table stays outside: the runtime reads the rows of the tokens in use from the weights file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from ....runtime.errors import UsageError
from ..layers import WeightSpace, linear

__all__ = ["TextGraph", "check_supported"]


class TextGraph(nn.Module):
    """The encoder's graph.

    Inputs: embeddings [1, L, d_model], mask [1, L] of 1 and 0; output: text [1, L, d_model], zero where the mask is.
    """

    def __init__(self, space: WeightSpace, document: Mapping[str, Any], length: int) -> None:
        """The encoder of a configuration for `length` tokens, its weights from a text encoder's space."""
        super().__init__()
        config, dialect = UMT5Config.from_dict(dict(document)), space.dialect
        self.config, self.length = config, length
        self.blocks = nn.ModuleList(
            TextBlock(space, f"encoder.block.{index}", config) for index in range(config.num_layers)
        )
        self.final_norm = space.vector("encoder.final_layer_norm.weight")
        self.norm = dialect.rms_norm(config.d_model, config.layer_norm_epsilon)
        count = config.relative_attention_num_buckets
        self.bucket_bias = dialect.bucket_bias(relative_buckets(config, length), count)  # one for all layers

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encoded text."""
        hidden = (1.0 - mask).reshape(1, 1, -1) * torch.finfo(torch.float32).min
        x = embeddings
        for block in self.blocks:
            x = block(x, hidden, self.bucket_bias)
        return self.norm(x, self.final_norm) * mask.reshape(1, -1, 1)


def relative_buckets(config: UMT5Config, length: int) -> torch.Tensor:
    """Bucket of each pair of positions [L, L], by transformers' own rule; one table for all layers."""
    with torch.device("meta"):  # its weights are not needed
        attention = UMT5Attention(config)
    position = torch.arange(length)
    buckets: torch.Tensor = attention._relative_position_bucket(position[None, :] - position[:, None])
    return buckets


class TextBlock(nn.Module):
    """Self-attention with a relative bias, then the gated feed-forward."""

    def __init__(self, space: WeightSpace, name: str, config: UMT5Config) -> None:
        """The block's weights."""
        super().__init__()
        width, eps = config.d_model, config.layer_norm_epsilon
        self.heads, self.gelu = config.num_heads, space.dialect.gelu
        self.rms_1, self.rms_2 = (space.dialect.rms_norm(width, eps) for _ in range(2))
        attention, feed_forward = f"{name}.layer.0", f"{name}.layer.1"
        self.norm_1 = space.vector(f"{attention}.layer_norm.weight")
        self.q, self.k, self.v, self.o = (
            linear(space, f"{attention}.SelfAttention.{part}", bias=False) for part in "qkvo"
        )
        self.bias = space.vector(f"{attention}.SelfAttention.relative_attention_bias.weight")
        self.norm_2 = space.vector(f"{feed_forward}.layer_norm.weight")
        self.wi_0, self.wi_1, self.wo = (
            linear(space, f"{feed_forward}.DenseReluDense.{part}", bias=False) for part in ("wi_0", "wi_1", "wo")
        )

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor, bucket_bias: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """x [1, L, d_model] to the same; `hidden` [1, 1, L] is very negative where a token is padding."""
        y = self.rms_1(x, self.norm_1)
        # [heads, L, size]; three axes, for the engines that multiply no more.
        q, k, v = (layer(y).reshape(y.shape[1], self.heads, -1).transpose(0, 1) for layer in (self.q, self.k, self.v))
        scores = (
            torch.bmm(q, k.transpose(1, 2)) + bucket_bias(self.bias, x.shape[1]) + hidden
        )  # T5 leaves them unscaled
        x = x + self.o(
            torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v).transpose(0, 1).reshape(*x.shape[:2], -1)
        )
        y = self.rms_2(x, self.norm_2)
        return x + self.wo(self.gelu(self.wi_0(y)) * self.wi_1(y))


def check_supported(config: Mapping[str, Any] | None) -> None:
    """Refuse a text encoder of another variant.

    Raises:
        UsageError: its feed-forward is not the gated GELU of UMT5, or its epsilon is none.
    """
    epsilon = (config or {}).get("layer_norm_epsilon", 1e-6)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise UsageError(f"text_encoder/config.json: expected layer_norm_epsilon between 0 and 1, found {epsilon!r}")
    found = (config or {}).get("feed_forward_proj", "gated-gelu")
    if found != "gated-gelu":
        raise UsageError(f"text_encoder/config.json: expected feed_forward_proj gated-gelu, found {found!r}")
