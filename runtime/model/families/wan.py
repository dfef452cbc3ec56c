"""Wan2.1 and Wan2.2, text to video: configurations, tensors, and what a forward costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ...chain.history import History
from ...chain.kinds import Kind
from ...chain.pyramid import Geometry, Resolution, Stage
from ...documents import is_number
from ...errors import UsageError
from ..schedules import PAPER_SCHEDULES
from .family import Patch, Shapes
from .wan_decoder import Compression, WanDecoderConfig

__all__ = ["WAN", "WAN_TI2V", "Wan", "WanConfig", "WanTI2V"]

TI2V_CHANNELS = 48
"""Latent channels of Wan2.2-TI2V."""


@dataclass(frozen=True)
class WanConfig:
    """Fields of diffusers' `WanTransformer3DModel` configuration that text-to-video models use."""

    class_name: ClassVar[str] = "WanTransformer3DModel"
    supported: ClassVar[str] = "text-to-video models"
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
    def fixed(cls) -> Mapping[str, Any]:
        """Fields that have one value which is supported, their default."""
        return {"image_dim": None, "added_kv_proj_dim": None, "qk_norm": "rms_norm_across_heads"}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> Self:
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: the configuration is of a variant that is not text-to-video, or has an impossible value.
        """
        for name, allowed in cls.fixed().items():
            if document.get(name, allowed) != allowed:
                raise UsageError(
                    f"{source}: only {cls.supported} are supported: expected {name} {allowed!r}, "
                    f"found {document[name]!r:.60}"
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
        return {"_class_name": self.class_name, **values}


def _checked(name: str, value: Any, source: str) -> Any:
    def positive(n: Any) -> bool:
        return type(n) is int and 0 < n < 2**31

    if name in ("patch_size", "rope_dim"):
        if isinstance(value, list) and len(value) == 3 and all(map(positive, value)):
            return tuple(value)
    elif name == "eps":
        if isinstance(value, float) and 0 < value < 1:
            return value
    elif name == "rope_theta":
        if is_number(value) and 1 < value < 1e9:
            return float(value)
    elif name in ("cross_attn_norm", "is_amplify_history"):
        if isinstance(value, bool):
            return value
    elif name == "history_scale_mode":
        if value in ("scalar", "per_head"):
            return value
    elif positive(value):
        return value
    raise UsageError(f"{source}: field '{name}' has an impossible value: {value!r}")


class Wan:
    """The family; see `family.Family`."""

    name = "wan"
    transformer_class = WanConfig.class_name
    pipeline_class = "WanPipeline"
    frame_rate = 16
    text_in_fp16 = False  # UMT5 leaves float16's range
    plain_resolution = Resolution(81, 480, 832)
    compression = Compression(4, 8, residual=False)
    """Of its VAE."""
    history: History | None = None
    clocked: bool = False
    unread: tuple[str, ...] = ()

    @property
    def assumed(self) -> tuple[str, Mapping[str, Any]]:
        """The paper's pyramid."""
        words = "pyramidal, three stages, Haar, first frame apart, the paper's schedules (0-0-n: plain Wan)"
        how = {"schedules": PAPER_SCHEDULES, "default_schedule": "2-2-1"}
        return words, {"kind": "pyramidal", "stages": 3, **how}

    def claims(self, document: Mapping[str, Any], decoder: Mapping[str, Any] | None) -> bool:
        """Whether the VAE, or without one the number of channels, is Wan2.1's, which Wan2.2-A14B has too."""
        return not _is_ti2v(document, decoder)

    def described(self, folder: Path) -> dict[str, Any] | None:
        """Nothing: models without `pyramid.json` are plain ones."""
        return None

    def geometry(self, config: WanConfig) -> Geometry:
        """The transformer's channels, and what its VAE makes of a latent pixel."""
        compression = self.compression
        return Geometry(channels=config.out_channels, temporal=compression.temporal, spatial=compression.spatial)

    def read_transformer(self, document: Mapping[str, Any], source: str) -> WanConfig:
        """See `WanConfig.from_json`."""
        return WanConfig.from_json(document, source)

    def read_decoder(self, document: Mapping[str, Any], config: WanConfig, source: str) -> WanDecoderConfig:
        """See `WanDecoderConfig.from_json`."""
        return WanDecoderConfig.from_json(document, config.in_channels, self.compression, source)

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

    def flops(self, config: WanConfig, stage: Stage, text_length: int) -> int:
        """FLOPs of one forward; all of the padded prompt is attended to."""
        n, m, d, f = stage.tokens, text_length, config.width, config.ffn_dim
        self_attention = 8 * n * d * d + 4 * n * n * d
        cross_attention = 4 * n * d * d + 4 * m * d * d + 4 * n * m * d
        block = self_attention + cross_attention + 4 * n * d * f
        patching = 2 * n * d * (config.in_channels + config.out_channels) * math.prod(stage.patch_size)
        text = 2 * m * (config.text_dim * d + d * d)
        time = 2 * (config.freq_dim * d + 7 * d * d)
        return config.num_layers * block + patching + text + time


class WanTI2V(Wan):
    """Wan2.2-TI2V, from text: Wan's transformer on the latents of the residual VAE."""

    name = "wan2.2-ti2v"
    frame_rate = 24
    plain_resolution = Resolution(121, 704, 1280)
    compression = Compression(4, 16, residual=True)

    def claims(self, document: Mapping[str, Any], decoder: Mapping[str, Any] | None) -> bool:
        """Whether the VAE, or without one the number of channels, is Wan2.2-TI2V's."""
        return _is_ti2v(document, decoder)


WAN = Wan()
WAN_TI2V = WanTI2V()


def _is_ti2v(document: Mapping[str, Any], decoder: Mapping[str, Any] | None) -> bool:
    """By the VAE where there is one: a small model may have any number of channels."""
    if decoder is None:
        return document.get("in_channels") == TI2V_CHANNELS
    return bool(decoder.get("is_residual")) or decoder.get("patch_size") not in (None, 1)


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
