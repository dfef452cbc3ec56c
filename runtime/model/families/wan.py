"""The Wan transformer as data: its configuration, its tensors, and what a forward costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...errors import UsageError

__all__ = ["Patch", "WanConfig", "flops_per_forward", "transformer_tensors"]

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class WanConfig:
    """Fields of diffusers' `WanTransformer3DModel` configuration that text-to-video models use."""

    patch_size: Patch = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    cross_attn_norm: bool = True

    @property
    def width(self) -> int:
        """Model width: heads times head size."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> "WanConfig":
        """From a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: the configuration is of another class, or of a variant that is not text-to-video.
        """
        found = document.get("_class_name", "no _class_name")
        if found != "WanTransformer3DModel":
            raise UsageError(f"{source}: expected the configuration of a WanTransformer3DModel, found {found}")
        for name, allowed in (
            ("image_dim", (None,)),
            ("added_kv_proj_dim", (None,)),
            ("qk_norm", ("rms_norm_across_heads",)),
        ):
            if document.get(name, allowed[0]) not in allowed:
                raise UsageError(
                    f"{source}: only text-to-video models are supported: expected {name} {allowed[0]}, found {document[name]}"
                )
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = document.get(field.name)
            if value is None:
                continue
            values[field.name] = cls._checked(field.name, value, source)
        config = cls(**values)
        if config.attention_head_dim % 2 or config.attention_head_dim < 6:
            raise UsageError(f"{source}: attention_head_dim is even and at least 6, found {config.attention_head_dim}")
        if config.num_layers > 1000:
            raise UsageError(f"{source}: at most 1000 blocks are supported, found num_layers {config.num_layers}")
        if config.in_channels != config.out_channels:
            raise UsageError(
                f"{source}: expected as many output as input channels, found {config.out_channels} and {config.in_channels}"
            )
        return config

    @staticmethod
    def _checked(name: str, value: Any, source: str) -> Any:
        def positive(n: Any) -> bool:
            return type(n) is int and 0 < n < 2**31

        if name == "patch_size":
            if isinstance(value, list) and len(value) == 3 and all(map(positive, value)):
                return tuple(value)
        elif name == "eps":
            if isinstance(value, float) and 0 < value < 1:
                return value
        elif name == "cross_attn_norm":
            if isinstance(value, bool):
                return value
        elif positive(value):
            return value
        raise UsageError(f"{source}: field '{name}' has an impossible value: {value!r}")


def transformer_tensors(
    config: WanConfig, kind: str = "plain", patch_sizes: Sequence[Patch] = ()
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a transformer, in diffusers' names.

    Pyramidal models add `first_frame_embedding`; PPF models have `patch_embedding.{i}` and `proj_out.{i}` for
    each stage, with that stage's patch size.
    """
    d, f = config.width, config.ffn_dim
    tensors: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (out, into), (out,)

    patches = [(f".{i}", patch) for i, patch in enumerate(patch_sizes)] if kind == "ppf" else [("", config.patch_size)]
    for suffix, patch in patches:
        tensors[f"patch_embedding{suffix}.weight"] = (d, config.in_channels, *patch)
        tensors[f"patch_embedding{suffix}.bias"] = (d,)
        linear(f"proj_out{suffix}", config.out_channels * math.prod(patch), d)
    linear("condition_embedder.time_embedder.linear_1", d, config.freq_dim)
    linear("condition_embedder.time_embedder.linear_2", d, d)
    linear("condition_embedder.time_proj", 6 * d, d)
    linear("condition_embedder.text_embedder.linear_1", d, config.text_dim)
    linear("condition_embedder.text_embedder.linear_2", d, d)
    tensors["scale_shift_table"] = (1, 2, d)
    if kind == "pyramidal":
        tensors["first_frame_embedding"] = (d,)
    for block in range(config.num_layers):
        prefix = f"blocks.{block}"
        tensors[f"{prefix}.scale_shift_table"] = (1, 6, d)
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{prefix}.{attention}.{projection}", d, d)
            for norm in ("norm_q", "norm_k"):
                tensors[f"{prefix}.{attention}.{norm}.weight"] = (d,)
        if config.cross_attn_norm:
            tensors[f"{prefix}.norm2.weight"] = tensors[f"{prefix}.norm2.bias"] = (d,)
        linear(f"{prefix}.ffn.net.0.proj", f, d)
        linear(f"{prefix}.ffn.net.2", d, f)
    return tensors


def flops_per_forward(config: WanConfig, tokens: int, text_length: int, patch_size: Patch | None = None) -> int:
    """FLOPs of one forward: twice the multiply-adds of the matrix products.

    Args:
        config: the transformer.
        tokens: length of the video's sequence.
        text_length: length of the padded prompt, all of which is attended to.
        patch_size: of the stage, where it is not the configuration's (PPF).
    """
    n, m, d, f = tokens, text_length, config.width, config.ffn_dim
    self_attention = 8 * n * d * d + 4 * n * n * d
    cross_attention = 4 * n * d * d + 4 * m * d * d + 4 * n * m * d
    block = self_attention + cross_attention + 4 * n * d * f
    patch = math.prod(patch_size or config.patch_size)
    patching = 2 * n * d * (config.in_channels + config.out_channels) * patch
    text = 2 * m * (config.text_dim * d + d * d)
    time = 2 * (config.freq_dim * d + 7 * d * d)
    return config.num_layers * block + patching + text + time
