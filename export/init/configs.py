"""Configurations of components that come without one: read off their tensors' shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ...runtime.errors import UsageError
from .presets import STATISTICS

__all__ = ["Shapes", "text_encoder_config", "transformer_config", "vae_config", "wan_config"]

Shapes = Mapping[str, tuple[int, ...]]
"""By diffusers' and transformers' names."""

HEAD = 128
"""Head size of every Wan model."""

WAN_FIELDS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "eps": "eps",
    "cross_attn_norm": "cross_attn_norm",
    "patch_size": "patch_size",
}
"""Wan's names of a configuration's fields, and diffusers'."""


def wan_config(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Diffusers' configuration of a transformer, of the one in Wan's own repositories.

    Raises:
        UsageError: it is of a model that takes more than text.
    """
    kind = document.get("model_type", "t2v")
    if kind not in ("t2v", "ti2v"):
        raise UsageError(f"{source}: only text-to-video models are supported: expected model_type t2v, found {kind!r}")
    found = {ours: document[theirs] for theirs, ours in WAN_FIELDS.items() if theirs in document}
    if "dim" in document and isinstance(found.get("num_attention_heads"), int):
        found["attention_head_dim"] = document["dim"] // max(found["num_attention_heads"], 1)
    return _transformer(found)


def _transformer(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads", **fields}


def transformer_config(shapes: Shapes, heads: int | None, source: str) -> tuple[dict[str, Any], list[str]]:
    """Configuration of a transformer, and what was assumed: shapes say nothing of the heads.

    Raises:
        UsageError: a tensor that says a size is not there, or the width is no multiple of a head's.
    """
    embedder = "condition_embedder"
    suffix = "" if "patch_embedding.weight" in shapes else ".0"
    patch = _shape(shapes, f"patch_embedding{suffix}.weight", 5, source)
    width = patch[0]
    assumed = ["eps 1e-06", "rope_max_seq_len 1024"]
    if heads is None:
        if width % HEAD:
            raise UsageError(
                f"{source}: nothing says how many heads a width of {width} has: give --heads, or config.json"
            )
        heads = width // HEAD
        assumed.append(f"{heads} heads of {HEAD}")
    if width % heads:
        raise UsageError(f"{source}: {heads} heads do not divide the width of {width}")
    fields = {
        "patch_size": list(patch[2:]),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": patch[1],
        "out_channels": _shape(shapes, f"proj_out{suffix}.weight", 2, source)[0] // math.prod(patch[2:]),
        "text_dim": _shape(shapes, f"{embedder}.text_embedder.linear_1.weight", 2, source)[1],
        "freq_dim": _shape(shapes, f"{embedder}.time_embedder.linear_1.weight", 2, source)[1],
        "ffn_dim": _shape(shapes, "blocks.0.ffn.net.0.proj.weight", 2, source)[0],
        "num_layers": _count(shapes, r"blocks\.(\d+)\."),
        "eps": 1e-6,
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "rope_max_seq_len": 1024,
    }
    return _transformer(fields), assumed


def vae_config(shapes: Shapes, source: str) -> tuple[dict[str, Any], list[str]]:
    """Configuration of a VAE, and what was assumed: shapes say nothing of the latents' mean and deviation.

    Raises:
        UsageError: a tensor that says a size is not there, or its latents are not those of Wan2.1 or Wan2.2.
    """
    channels = _shape(shapes, "post_quant_conv.weight", 5, source)[0]
    if channels not in STATISTICS:
        known = " or ".join(map(str, STATISTICS))
        raise UsageError(
            f"{source}: nothing says the mean and deviation of {channels} latent channels (known: of {known}): "
            "put the VAE's config.json beside it"
        )
    mean, std = STATISTICS[channels]
    base = _shape(shapes, "decoder.norm_out.gamma", 4, source)[0]
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    widths = [
        _shape(shapes, f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 5, source)[0] for level in range(levels)
    ]
    residual = any(name.startswith("decoder.up_blocks.0.upsampler.") for name in shapes)
    upsampler = "upsampler" if residual else "upsamplers.0"
    doubles = [f"decoder.up_blocks.{level}.{upsampler}.time_conv.weight" in shapes for level in range(levels - 1)]
    colours = _shape(shapes, "decoder.conv_out.weight", 5, source)[0]
    fields: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": _shape(shapes, "encoder.conv_in.weight", 5, source)[0],
        "decoder_base_dim": base,
        "z_dim": channels,
        "dim_mult": [width // base for width in reversed(widths)],
        "num_res_blocks": _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        "attn_scales": [],
        "temperal_downsample": doubles[::-1],
        "latents_mean": mean,
        "latents_std": std,
    }
    if colours != 3:
        patch = math.isqrt(colours // 3)
        fields |= {"in_channels": colours, "out_channels": colours, "patch_size": patch, "is_residual": residual}
        fields |= {"scale_factor_temporal": 2 ** sum(doubles), "scale_factor_spatial": patch * 2 ** (levels - 1)}
    return fields, [f"mean and deviation of the latents as in Wan{'2.1' if channels == 16 else '2.2'}"]


def text_encoder_config(shapes: Shapes, source: str) -> tuple[dict[str, Any], list[str]]:
    """Configuration of UMT5's encoder, and what was assumed.

    Raises:
        UsageError: a tensor that says a size is not there.
    """
    table = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    vocabulary, width = _shape(shapes, table, 2, source)
    buckets, heads = _shape(shapes, f"{attention}.relative_attention_bias.weight", 2, source)
    fields = {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": _shape(shapes, f"{feed}.wi_0.weight", 2, source)[0],
        "d_kv": _shape(shapes, f"{attention}.q.weight", 2, source)[0] // heads,
        "num_heads": heads,
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }
    return fields, ["position biases end at a distance of 128", "layer_norm_epsilon 1e-06"]


def _shape(shapes: Shapes, name: str, axes: int, source: str) -> tuple[int, ...]:
    if name not in shapes or len(shapes[name]) != axes or not all(shapes[name]):
        found = f"found {list(shapes[name])}" if name in shapes else "found none"
        raise UsageError(f"{source}: expected a tensor '{name}' of {axes} axes, which says a size, {found}")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many things are numbered so in the names."""
    numbers = (match[1] for match in map(re.compile(pattern).match, shapes) if match)
    return 1 + max(map(int, numbers), default=-1)
