"""Helios: Wan's transformer in three stages with clocks of their own, chunk after chunk (Apache-2.0, Yuan et al.).

Facts are those of diffusers' `HeliosTransformer3DModel` and `HeliosPyramidPipeline`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ...chain.history import HISTORY, History
from ...chain.kinds import Kind
from ...chain.pyramid import Resolution, Stage
from ...errors import UsageError
from .family import Patch, Shapes
from .helios_scheduler import described, published
from .wan import Wan, WanConfig

__all__ = ["HELIOS", "LONG", "MID", "SHORT", "Helios", "HeliosConfig", "Pooled"]


@dataclass(frozen=True)
class Pooled:
    """A part of the history whose tokens have a patch embedding of their own."""

    layer: str
    frames: tuple[int, ...]
    """Which of the history's latent frames."""
    times: int
    """Its patch size, in patch sizes of the current latent."""

    def grid(self, latent: tuple[int, int, int, int], patch: Patch) -> Patch:
        """Its tokens along T, H and W, for the shape of the finest stage's latent."""
        sizes = (len(self.frames), *latent[2:])
        t, h, w = (size // (self.times * p) for size, p in zip(sizes, patch, strict=True))
        return t, h, w


LONG, MID, SHORT = (
    Pooled("patch_long", tuple(range(1, 17)), 4),
    Pooled("patch_mid", (17, 18), 2),
    Pooled("patch_short", (0, 19), 1),
)
"""`history_sizes` [16, 2, 1] and the first frame of all, which goes with the last one: the order of their tokens."""


RECENT = History(recent=19)


@dataclass(frozen=True)
class HeliosConfig(WanConfig):
    """Fields of diffusers' `HeliosTransformer3DModel` configuration."""

    class_name: ClassVar[str] = "HeliosTransformer3DModel"
    supported: ClassVar[str] = "Helios' published transformers"
    rope_dim: Patch = (44, 42, 42)
    """Channels of a head that turn with T, H and W."""
    rope_theta: float = 10000.0
    is_amplify_history: bool = False
    """Keys of the history have a scale of their own."""
    history_scale_mode: str = "per_head"

    @property
    def longest_axis(self) -> int:
        """Positions are computed, and end nowhere."""
        return 2**31 - 1

    @classmethod
    def fixed(cls) -> Mapping[str, Any]:
        """See `WanConfig.fixed`."""
        names = ("guidance_cross_attn", "zero_history_timestep", "has_multi_term_memory_patch")
        return {"added_kv_proj_dim": None, "qk_norm": "rms_norm_across_heads", **dict.fromkeys(names, True)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], source: str) -> Self:
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: the configuration is of a variant that is not supported, or has an impossible value.
        """
        config = super().from_json(document, source)
        if sum(config.rope_dim) != config.attention_head_dim or any(n % 2 for n in config.rope_dim):
            raise UsageError(
                f"{source}: rope_dim is three even numbers that add up to attention_head_dim "
                f"{config.attention_head_dim}, found {list(config.rope_dim)}"
            )
        if config.patch_size != (1, 2, 2):
            raise UsageError(f"{source}: expected patch_size [1, 2, 2], found {list(config.patch_size)}")
        return config

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads, without the length of Wan's tables, which diffusers warns of."""
        return {name: value for name, value in super().to_json().items() if name != "rope_max_seq_len"}


class Helios(Wan):
    """The family; see `family.Family`. Its text encoder and VAE are Wan2.1's."""

    name = "helios"
    transformer_class = HeliosConfig.class_name
    pipeline_class = "HeliosPyramidPipeline"
    frame_rate = 24
    plain_resolution = Resolution(33, 384, 640)
    """Of a chunk."""
    history: History | None = RECENT
    clocked: bool = True
    unread: tuple[str, ...] = ("transformer_ode",)

    @property
    def assumed(self) -> tuple[str, Mapping[str, Any]]:
        """Distilled, and Mid's schedule beside its own."""
        return "Helios-Distilled's scheduler as diffusers has it, and Helios-Mid's schedule 20-20-20", published()

    def claims(self, document: Mapping[str, Any], decoder: Mapping[str, Any] | None) -> bool:
        """Whatever has its class."""
        return True

    def described(self, folder: Path) -> dict[str, Any]:
        """What the scheduler's configuration and the index say."""
        return described(folder)

    def read_transformer(self, document: Mapping[str, Any], source: str) -> HeliosConfig:
        """See `HeliosConfig.from_json`."""
        return HeliosConfig.from_json(document, source)

    def stage_inputs(self, config: WanConfig, stage: Stage, text_length: int) -> Shapes:
        """Wan's, and the history in the finest stage's size."""
        channels, _, height, width = stage.whole
        history = (1, channels, RECENT.frames, height, width)
        return super().stage_inputs(config, stage, text_length) | {HISTORY: history}

    def transformer_tensors(self, config: WanConfig, kind: Kind, patch_sizes: Sequence[Patch]) -> Shapes:
        """Wan's, and the patch embeddings of the history."""
        assert isinstance(config, HeliosConfig)
        found = super().transformer_tensors(config, kind, patch_sizes)
        found["norm_out.scale_shift_table"] = found.pop("scale_shift_table")
        for part in (SHORT, MID, LONG):
            patch = tuple(part.times * p for p in config.patch_size)
            found[f"{part.layer}.weight"] = (config.width, config.in_channels, *patch)
            found[f"{part.layer}.bias"] = (config.width,)
        if config.is_amplify_history:
            scales = config.num_attention_heads if config.history_scale_mode == "per_head" else 1
            found |= {f"blocks.{index}.attn1.history_key_scale": (scales,) for index in range(config.num_layers)}
        return found

    def history_tokens(self, config: WanConfig, stage: Stage) -> int:
        """Tokens of the history, in every stage."""
        return sum(math.prod(part.grid(stage.whole, config.patch_size)) for part in (LONG, MID, SHORT))

    def flops(self, config: WanConfig, stage: Stage, text_length: int) -> int:
        """FLOPs of one forward: Wan's, the history's tokens in all but the cross-attention and the output."""
        n, h, d, f = stage.tokens, self.history_tokens(config, stage), config.width, config.ffn_dim
        block = 8 * h * d * d + 4 * ((n + h) ** 2 - n * n) * d + 4 * h * d * f
        channels, _, height, width = stage.whole
        patching = 2 * d * channels * RECENT.frames * height * width  # each pixel is in one patch
        time = 2 * (config.freq_dim * d + 7 * d * d)
        return super().flops(config, stage, text_length) + config.num_layers * block + patching + time


HELIOS = Helios()
