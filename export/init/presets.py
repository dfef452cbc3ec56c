"""The sizes that a random checkpoint can have."""

from collections.abc import Mapping
from typing import Any

from ...runtime.chain.pyramid import Resolution

__all__ = ["PRESETS", "RESOLUTIONS", "TRANSFORMERS", "UMT5"]

TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "ffn_dim": 128,
        "num_layers": 2,
        "text_dim": 32,
    },
    "wan2.1-1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-14b": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
}
UMT5: Mapping[str, dict[str, Any]] = {
    "tiny": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 384},
    "xxl": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 256384,
    },
}
RESOLUTIONS = {
    "tiny": Resolution(17, 64, 64),
    "wan2.1-1.3b": Resolution(81, 448, 832),
    "wan2.1-14b": Resolution(81, 448, 832),
}
PRESETS = tuple(TRANSFORMERS)
"""Names of the sizes: a tiny model, and those of Wan2.1."""
