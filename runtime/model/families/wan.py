"""Wan2.1, text to video: its configurations, its tensors, and what a forward costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...chain.kinds import Kind
from ...chain.pyramid import Geometry, Stage
from ...documents import Fields
from ...errors import UsageError
from .family import Patch, Shapes

__all__ = ["WAN", "Wan", "WanConfig", "WanDecoderConfig"]


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

    @property
    def longest_axis(self) -> int:
        """Tokens along an axis at which the tables of positions end."""
        return self.rope_max_seq_len

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> "WanConfig":
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: the configuration is of a variant that is not text-to-video, or has an impossible value.
        """
        for name, allowed in (("image_dim", None), ("added_kv_proj_dim", None), ("qk_norm", "rms_norm_across_heads")):
            if document.get(name, allowed) != allowed:
                raise UsageError(
                    f"{source}: only text-to-video models are supported: expected {name} {allowed}, "
                    f"found {document[name]}"
                )
        known = {field.name: document.get(field.name) for field in fields(cls)}
        config = cls(**{name: _checked(name, value, source) for name, value in known.items() if value is not None})
        if config.attention_head_dim % 2 or config.attention_head_dim < 6:
            raise UsageError(f"{source}: attention_head_dim is even and at least 6, found {config.attention_head_dim}")
        if config.num_layers > 1000:
            raise UsageError(f"{source}: at most 1000 blocks are supported, found num_layers {config.num_layers}")
        if config.in_channels != config.out_channels:
            raise UsageError(
                f"{source}: expected as many output as input channels, "
                f"found {config.out_channels} and {config.in_channels}"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {"_class_name": Wan.transformer_class, **values}


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


@dataclass(frozen=True)
class WanDecoderConfig:
    """Fields of diffusers' `AutoencoderKLWan` configuration that the decoder's shapes depend on."""

    z_dim: int = 16
    base_dim: int = 96
    """The decoder's, which diffusers' `decoder_base_dim` sets apart from the encoder's."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], config: WanConfig, source: str) -> "WanDecoderConfig":
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: the VAE is another than Wan2.1's, or of other latents than the transformer's.
        """
        fields = Fields(document, source)
        fields.text("_class_name", "AutoencoderKLWan", choices=("AutoencoderKLWan",))
        channels = fields.integer("z_dim", 16)
        if channels != config.in_channels:
            raise fields.wrong("z_dim", f"{config.in_channels}, the transformer's input channels")
        if document.get("is_residual") or document.get("patch_size") is not None:
            raise UsageError(f"{source}: only Wan2.1's VAE is supported (4x8x8), found the residual one of Wan2.2")
        _check_statistics(fields, channels)
        widths = fields.get("dim_mult", "a list of whole numbers", _are_counts, [1, 2, 4, 4])
        downsample = fields.get(
            "temperal_downsample",
            f"true or false, {len(widths) - 1} times",
            lambda v: isinstance(v, list) and len(v) >= len(widths) - 1 and all(isinstance(flag, bool) for flag in v),
            [False, True, True],
        )
        blocks = fields.get(
            "num_res_blocks", "a whole number below 1024", lambda v: type(v) is int and 0 <= v < 1024, 2
        )
        temporal, spatial = 2 ** sum(downsample[1 - len(widths) :]), 2 ** (len(widths) - 1)
        if (temporal, spatial) != (4, 8):
            raise UsageError(
                f"{source}: only Wan2.1's VAE is supported (4x8x8), found one of {temporal}x{spatial}x{spatial} "
                "by its dim_mult and temperal_downsample"
            )
        return cls(
            channels,
            fields.integer("decoder_base_dim", fields.integer("base_dim", 96)),
            tuple(widths),
            blocks,
            tuple(downsample),
        )

    def cache_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """The last two frames [2, C, h, w] that went into each causal convolution of more than one tap, in order."""
        widths = [self.base_dim * factor for factor in (self.dim_mult[-1], *reversed(self.dim_mult))]
        shapes = [(2, self.z_dim, height, width)] + 4 * [(2, widths[0], height, width)]
        channels, last = widths[0], len(self.dim_mult) - 1
        for index, out in enumerate(widths[1:]):
            for _ in range(self.num_res_blocks + 1):
                shapes += [(2, channels, height, width), (2, out, height, width)]
                channels = out
            if index < last:
                if self.temperal_downsample[-1 - index]:
                    shapes.append((2, out, height, width))
                channels, height, width = out // 2, 2 * height, 2 * width
        return [*shapes, (2, channels, height, width)]

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def _check_statistics(fields: Fields, channels: int) -> None:
    """The latents' mean and deviation, where they are written, must be those of a number of channels."""
    for name, expected, inside in (
        ("latents_mean", "numbers", lambda value: True),
        ("latents_std", "numbers above 0", lambda value: value > 0),
    ):
        if fields.document.get(name) is not None:
            numbers = fields.numbers(name)
            if len(numbers) != channels or not all(map(inside, numbers)):
                raise fields.wrong(name, f"{channels} {expected}")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(type(n) is int and 0 < n < 1024 for n in value)


class Wan:
    """The family; see `family.Family`."""

    name = "wan"
    transformer_class = "WanTransformer3DModel"
    frame_rate = 16
    text_in_fp16 = False  # UMT5 leaves float16's range

    def geometry(self, config: WanConfig) -> Geometry:
        """The transformer's channels, and 4 frames of 8x8 pixels to a latent pixel."""
        return Geometry(channels=config.out_channels, temporal=4, spatial=8)

    def read_transformer(self, document: Mapping[str, Any], source: str) -> WanConfig:
        """See `WanConfig.from_json`."""
        return WanConfig.from_json(document, source)

    def read_decoder(self, document: Mapping[str, Any], config: WanConfig, source: str) -> WanDecoderConfig:
        """See `WanDecoderConfig.from_json`."""
        return WanDecoderConfig.from_json(document, config, source)

    def stage_inputs(self, config: WanConfig, stage: Stage, text_length: int) -> Shapes:
        """The latent, the timestep's features, and the prompt's embeddings."""
        return {
            "latent": (1, *stage.latent),
            "timestep_features": (1, config.freq_dim),
            "text": (1, text_length, config.text_dim),
        }

    def transformer_tensors(self, config: WanConfig, kind: Kind, patch_sizes: Sequence[Patch]) -> Shapes:
        """Name and shape of every tensor of a transformer.

        A kind adds `first_frame_embedding`, or `patch_embedding.{i}` and `proj_out.{i}` for stages with layers of their
        own.
        """
        d = config.width
        tensors: Shapes = {}
        patches = [(f".{i}", patch) for i, patch in enumerate(patch_sizes)]
        for suffix, patch in patches if kind.own_patch_layers else [("", config.patch_size)]:
            tensors[f"patch_embedding{suffix}.weight"] = (d, config.in_channels, *patch)
            tensors[f"patch_embedding{suffix}.bias"] = (d,)
            tensors |= _linear(f"proj_out{suffix}", config.out_channels * math.prod(patch), d)
        embedder = "condition_embedder"
        tensors |= _linear(f"{embedder}.time_embedder.linear_1", d, config.freq_dim)
        tensors |= _linear(f"{embedder}.time_embedder.linear_2", d, d)
        tensors |= _linear(f"{embedder}.time_proj", 6 * d, d)
        tensors |= _linear(f"{embedder}.text_embedder.linear_1", d, config.text_dim)
        tensors |= _linear(f"{embedder}.text_embedder.linear_2", d, d)
        tensors["scale_shift_table"] = (1, 2, d)
        if kind.first_frame_embedding:
            tensors["first_frame_embedding"] = (d,)
        for block in range(config.num_layers):
            tensors |= _block_tensors(config, f"blocks.{block}")
        return tensors

    def flops(self, config: WanConfig, tokens: int, text_length: int, patch_size: Patch) -> int:
        """FLOPs of one forward; all of the padded prompt is attended to."""
        n, m, d, f = tokens, text_length, config.width, config.ffn_dim
        self_attention = 8 * n * d * d + 4 * n * n * d
        cross_attention = 4 * n * d * d + 4 * m * d * d + 4 * n * m * d
        block = self_attention + cross_attention + 4 * n * d * f
        patching = 2 * n * d * (config.in_channels + config.out_channels) * math.prod(patch_size)
        text = 2 * m * (config.text_dim * d + d * d)
        time = 2 * (config.freq_dim * d + 7 * d * d)
        return config.num_layers * block + patching + text + time


WAN = Wan()


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _block_tensors(config: WanConfig, prefix: str) -> Shapes:
    d, f = config.width, config.ffn_dim
    tensors: Shapes = {f"{prefix}.scale_shift_table": (1, 6, d)}
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            tensors |= _linear(f"{prefix}.{attention}.{projection}", d, d)
        for norm in ("norm_q", "norm_k"):
            tensors[f"{prefix}.{attention}.{norm}.weight"] = (d,)
    if config.cross_attn_norm:
        tensors[f"{prefix}.norm2.weight"] = tensors[f"{prefix}.norm2.bias"] = (d,)
    return tensors | _linear(f"{prefix}.ffn.net.0.proj", f, d) | _linear(f"{prefix}.ffn.net.2", d, f)
