"""The dialects of LoRA files: what a key says, and what a pair is multiplied with.

A key is a prefix, a layer in Wan's original names or diffusers', and a suffix that says what it is.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError
from ...runtime.model.safetensors import TensorEntry, read_metadata
from .edits import read_tensor

__all__ = ["WHOLE", "Factors", "layers_of"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = "lora_unet_"
"""What comes before a layer whose name has underscores for its dots."""

WORDS = re.compile(
    r"(?:self|cross)_attn|(?:norm_)?[qk]_img|v_img|norm_[qk]|(?:patch|text|time)_embedding|time_projection|img_emb"
    r"|patch_(?:short|mid|long)"
    r"|condition_embedder|(?:time|text)_embedder|time_proj|linear_\d|proj_out|to_(?:out|[qkv])|add_[kv]_proj"
)
"""Parts of names that have underscores of their own."""

IMAGE = ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "image_embedder")
"""Layers that only models from an image to a video have."""

_DEFAULT = r"(?:\.default)?"
SUFFIXES = {
    "up": rf"\.lora_up\.weight|\.lora_B{_DEFAULT}(?:\.weight)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "down": rf"\.lora_down\.weight|\.lora_A{_DEFAULT}(?:\.weight)?|[._]lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight",
    "bias": rf"\.lora_up\.bias|\.lora_B{_DEFAULT}\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
}
KEY = re.compile("(?P<layer>.+?)(?:" + "|".join(f"(?P<{role}>{text})" for role, text in SUFFIXES.items()) + ")")
WHOLE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
"""What is added as it is, and the tensor of the layer that it is added to."""

METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a core",
}
"""What names of other methods hold."""

METADATA = "lora_adapter_metadata"
"""What diffusers writes of the adapter beside the tensors, as JSON."""


def layers_of(file: Path, entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """What a file says of each layer, by role."""
    layers = defaultdict[str, dict[str, TensorEntry]](dict)
    for key, entry in entries.items():
        method = next((name for part, name in METHODS.items() if part in key), None)
        if method is not None:
            raise UsageError(f"{file}: key '{key}' is of {method}: expected LoRA, or whole changes (.diff)")
        match = KEY.fullmatch(key)
        if match is None or match.lastgroup is None:
            raise UsageError(f"{file}: key '{key}' is not used: expected a LoRA's pairs, alphas or changes (.diff)")
        layer, role = _bare(match["layer"]), match.lastgroup
        if any(part in layer for part in IMAGE):
            if role not in ("down", "alpha") and read_tensor(entry).any():
                raise UsageError(
                    f"{file}: key '{key}' is of a layer of image-to-video models, and not zero: "
                    "expected a LoRA of this model"
                )
            continue
        found = layers[layer]
        if role in found:
            raise UsageError(f"{file}: keys '{found[role].name}' and '{key}' say the same of one layer")
        found[role] = entry
    return layers


def _bare(layer: str) -> str:
    """A layer's name with dots and without prefixes."""
    if layer.startswith(UNDERSCORED):
        rest = layer.removeprefix(UNDERSCORED)
        # Underscores of words are set aside while the others become dots.
        marked = WORDS.sub(lambda match: match[0].replace("_", "~"), rest)
        return marked.replace("_", ".").replace("~", "_")
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), ""):
        layer = layer.removeprefix(prefix)
    return layer


class Factors:
    """What a file multiplies its pairs with: alpha / rank, by tensors or by diffusers' metadata; 1 if it says none."""

    def __init__(self, file: Path) -> None:
        """Read the metadata of a file.

        Raises:
            UsageError: it is malformed, or of another method.
        """
        self.file = file
        try:
            found = json.loads(read_metadata(file).get(METADATA, "{}"))
            self.adapter = {name.removeprefix("transformer."): value for name, value in found.items()}
        except (ValueError, AttributeError, RecursionError):
            raise UsageError(f"{file}: metadata '{METADATA}' is malformed: expected a JSON object") from None
        if self.adapter.get("use_dora"):
            raise UsageError(f"{file}: metadata '{METADATA}' speaks of DoRA: expected LoRA")

    def of(self, layer: str, rank: int, alpha: TensorEntry | None) -> float:
        """The factor of one pair."""
        if alpha is not None:
            if alpha.elements != 1:
                raise UsageError(f"{self.file}: key '{alpha.name}' is {list(alpha.shape)}: expected one number")
            return float(read_tensor(alpha)) / rank
        value = self._alpha(layer)
        if value is None:
            return 1.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UsageError(f"{self.file}: metadata '{METADATA}': expected a number as lora_alpha, found {value!r}")
        return float(value) / (math.sqrt(rank) if self.adapter.get("use_rslora") else rank)

    def _alpha(self, layer: str) -> Any:
        """Diffusers writes a layer's own alpha under its name, or the end of it."""
        own = (self.adapter.get("alpha_pattern") or {}).items()
        return next((v for name, v in own if f".{layer}".endswith(f".{name}")), self.adapter.get("lora_alpha"))
