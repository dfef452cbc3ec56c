"""The models that a random checkpoint can have the names and shapes of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...runtime.chain.pyramid import Resolution
from ...runtime.model.families.helios import HeliosConfig
from ...runtime.model.families.wan import WanConfig

__all__ = ["EULER", "PRESETS", "STATISTICS", "Preset", "unipc"]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


STATISTICS: Mapping[int, tuple[list[float], list[float]]] = {
    16: (
        _numbers(
            """-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508
            0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"""
        ),
        _numbers(
            """2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743
            3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"""
        ),
    ),
    48: (
        _numbers(
            """-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891
            0.1570 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502
            -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723
            -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667"""
        ),
        _numbers(
            """0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
            0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
            0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
            0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744"""
        ),
    ),
}
"""Mean and deviation of the latents of Wan2.1's and Wan2.2's VAE, by their number of channels."""

TINY: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "ffn_dim": 128,
    "num_layers": 2,
    "text_dim": 32,
}
TINY_TEXT = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 384}
XXL_TEXT = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
WAN_14B: dict[str, Any] = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
RESIDUAL: dict[str, Any] = {
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": STATISTICS[48][0],
    "latents_std": STATISTICS[48][1],
}
"""What Wan2.2's VAE has beside its widths."""


EULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}


def unipc(shift: float) -> dict[str, Any]:
    """The scheduler of Wan's own models."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }


@dataclass(frozen=True)
class Preset:
    """A model."""

    transformer: Mapping[str, Any]
    """Fields of its configuration."""
    resolution: Resolution
    vae: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its configuration; none: Wan2.1's."""
    text: Mapping[str, Any] = field(default_factory=lambda: XXL_TEXT)
    kind: str = "pyramidal"
    """Of what it stands for, unless another is asked for."""
    dtype: str = "float32"
    """Of its transformer."""
    text_dtype: str = "bfloat16"
    text_length: int = 512
    scheduler: Mapping[str, Any] = field(default_factory=lambda: EULER)
    boundary: float | None = None
    """Of a model of two transformers: the natural level below which the second one is asked."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `model_index.json`, beside its parts."""
    config: type[WanConfig] = WanConfig
    """Of its transformer."""


SMALL = Preset(
    TINY,
    Resolution(17, 64, 64),
    {"base_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0},
    TINY_TEXT,
    text_dtype="float32",
    text_length=64,
)

EXPAND = {"expand_timesteps": True}

HELIOS = Preset(
    WAN_14B,
    Resolution(33, 384, 640),
    kind="clocked",
    dtype="bfloat16",
    scheduler={"_class_name": "HeliosScheduler", "scheduler_type": "unipc"},
    index={"is_cfg_zero_star": True, "is_distilled": False},
    config=HeliosConfig,
)
"""As Helios-Mid is sampled."""

DISTILLED: dict[str, Any] = {
    "scheduler": {
        "_class_name": "HeliosDMDScheduler",
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
    },
    "index": {"is_cfg_zero_star": False, "is_distilled": True},
}
"""What Helios-Distilled has in place of it."""

TINY_HELIOS = replace(
    HELIOS,
    transformer={**TINY, "rope_dim": (8, 4, 4)},
    resolution=Resolution(9, 64, 128),
    vae=SMALL.vae,
    text=TINY_TEXT,
    dtype="float32",
    text_dtype="float32",
)

PRESETS: Mapping[str, Preset] = {
    "tiny": SMALL,
    "tiny-ti2v": replace(
        SMALL,
        transformer={**TINY, "in_channels": 48, "out_channels": 48},
        vae={**RESIDUAL, "base_dim": 8, "decoder_base_dim": 16, "num_res_blocks": 1},
        kind="plain",
        scheduler=unipc(5.0),
        index=EXPAND,
    ),
    "tiny-a14b": replace(SMALL, kind="plain", scheduler=unipc(12.0), boundary=0.875),
    "tiny-helios": TINY_HELIOS,
    "tiny-helios-distilled": replace(TINY_HELIOS, **DISTILLED),
    "wan2.1-1.3b": Preset(
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        Resolution(81, 448, 832),
    ),
    "wan2.1-14b": Preset(WAN_14B, Resolution(81, 448, 832), dtype="bfloat16"),
    "wan2.2-ti2v-5b": Preset(
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        Resolution(121, 704, 1280),
        {**RESIDUAL, "base_dim": 160, "decoder_base_dim": 256},
        kind="plain",
        dtype="bfloat16",
        scheduler=unipc(5.0),
        index=EXPAND,
    ),
    "wan2.2-t2v-a14b": Preset(
        WAN_14B, Resolution(81, 480, 832), kind="plain", dtype="bfloat16", scheduler=unipc(12.0), boundary=0.875
    ),
    "helios-14b": HELIOS,
    "helios-14b-distilled": replace(HELIOS, **DISTILLED),
}
"""By name: tiny models, and the real ones."""
