"""The UMT5 encoder as a graph over embeddings, at one static length.

The embedding table stays outside: the runtime reads the rows of the tokens in use from the weights file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from ..runtime.checkpoint import Checkpoint
from ..runtime.errors import UsageError
from .layers import WeightSpace, linear

__all__ = ["TextGraph", "check_supported"]


class TextGraph(nn.Module):
    """Inputs: embeddings [1, L, d_model], mask [1, L] of 1 and 0; output: text [1, L, d_model], zero where the mask is."""

    def __init__(self, checkpoint: Checkpoint, length: int, precision: str) -> None:
        """The encoder of a checkpoint for `length` tokens."""
        super().__init__()
        assert checkpoint.text_encoder_config is not None
        config = UMT5Config.from_dict(dict(checkpoint.text_encoder_config))
        space = WeightSpace("text_encoder", checkpoint.text_encoder, precision)
        self.config, self.length = config, length
        self.blocks = nn.ModuleList(
            TextBlock(space, f"encoder.block.{index}", config) for index in range(config.num_layers)
        )
        self.final_norm = space.vector("encoder.final_layer_norm.weight")
        self.register_buffer("buckets", relative_buckets(config, length), persistent=False)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encoded text."""
        hidden = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
        x = embeddings
        for block in self.blocks:
            x = block(x, hidden, self.buckets)
        x = nn.functional.rms_norm(x, (self.config.d_model,), self.final_norm, self.config.layer_norm_epsilon)
        return x * mask[:, :, None]


def relative_buckets(config: UMT5Config, length: int) -> torch.Tensor:
    """Bucket of each pair of positions [L, L], by transformers' own rule; one table for all layers."""
    attention: Any = UMT5Attention.__new__(UMT5Attention)
    attention.is_decoder = False
    attention.relative_attention_num_buckets = config.relative_attention_num_buckets
    attention.relative_attention_max_distance = config.relative_attention_max_distance
    position = torch.arange(length)
    buckets: torch.Tensor = attention._relative_position_bucket(position[None, :] - position[:, None])
    return buckets.to(torch.int32)


class TextBlock(nn.Module):
    """Self-attention with a relative bias, then the gated feed-forward."""

    def __init__(self, space: WeightSpace, name: str, config: UMT5Config) -> None:
        """The block's weights."""
        super().__init__()
        self.config = config
        attention, feed_forward = f"{name}.layer.0", f"{name}.layer.1"
        self.norm_1 = space.vector(f"{attention}.layer_norm.weight")
        self.q, self.k, self.v, self.o = (linear(space, f"{attention}.SelfAttention.{part}") for part in "qkvo")
        self.bias = space.vector(f"{attention}.SelfAttention.relative_attention_bias.weight")
        self.norm_2 = space.vector(f"{feed_forward}.layer_norm.weight")
        self.wi_0, self.wi_1, self.wo = (
            linear(space, f"{feed_forward}.DenseReluDense.{part}") for part in ("wi_0", "wi_1", "wo")
        )

    def forward(self, x: torch.Tensor, hidden: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
        """[1, L, d_model] to the same; `hidden` [1, 1, 1, L] is very negative where a token is padding."""
        width, eps, heads = (self.config.d_model,), self.config.layer_norm_epsilon, self.config.num_heads
        y = nn.functional.rms_norm(x, width, self.norm_1, eps)
        q, k, v = (layer(y).unflatten(-1, (heads, -1)) for layer in (self.q, self.k, self.v))
        bias = (
            nn.functional.embedding(buckets, self.bias).permute(2, 0, 1).unsqueeze(0)
        )  # T5 adds it to unscaled scores
        scores = torch.softmax(torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) + bias + hidden, dim=-1)
        x = x + self.o(torch.matmul(scores, v.transpose(1, 2)).transpose(1, 2).flatten(2))
        y = nn.functional.rms_norm(x, width, self.norm_2, eps)
        return x + self.wo(nn.functional.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


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
