"""LoRA files, in the dialects that trainers write, as edits of the transformer's tensors.

A key is a prefix, a layer in Wan's original names or diffusers', and a suffix that says what it is. All keys of a file
are used, or it is refused.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.dtypes import WEIGHT_DTYPES
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint, Lora
from ...runtime.model.safetensors import Edit, TensorEntry, read_header, read_metadata
from .edits import Added, LowRank, read_rows, read_tensor
from .names import to_diffusers

__all__ = ["merge_loras", "parse_lora", "read_changes"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = "lora_unet_"
"""What comes before a layer whose name has underscores for its dots."""

WORDS = re.compile(
    r"(?:self|cross)_attn|(?:norm_)?[qk]_img|v_img|norm_[qk]|(?:patch|text|time)_embedding|time_projection|img_emb"
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


def parse_lora(text: str) -> Lora:
    """A LoRA as FILE[:SCALE].

    Raises:
        UsageError: the file is not there, or the scale is not a number.
    """
    name, colon, number = text.rpartition(":")
    if colon and not Path(text).is_file():
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UsageError(f"--lora is FILE[:SCALE], found '{text}': no such file, and '{number}' is no scale")
        text = name
    else:
        scale = 1.0
    if not Path(text).is_file():
        raise UsageError(f"{text} does not exist: expected a LoRA in a safetensors file")
    return Lora(Path(text), scale)


def merge_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The checkpoint with LoRAs merged into its transformer, each tensor as it is read.

    Raises:
        UsageError: a key of a file is not used, is of another model, or of a method that is not supported.
    """
    if not loras:
        return checkpoint
    edited = dict(checkpoint.transformer)
    given = list[Path]()
    for lora in loras:
        if lora.file.resolve() in given:
            raise UsageError(f"{lora.file} is given twice: give it once, with the sum of its scales")
        given.append(lora.file.resolve())
        for name, edit in _read_edits(lora, checkpoint.transformer):
            edited[name] = replace(edited[name], edits=(*edited[name].edits, edit))
    return replace(checkpoint, transformer=edited, loras=(*checkpoint.loras, *loras))


def read_changes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Of each LoRA: the tensors that it changes, with rank, scale and norm of the change against that of the weight.

    Reads every changed tensor once, a piece at a time.
    """
    sizes = {
        name: _square(replace(entry, edits=tuple(e for e in entry.edits if not isinstance(e, LowRank | Added))))
        for name, entry in checkpoint.transformer.items()
        if any(isinstance(e, LowRank | Added) for e in entry.edits)
    }
    out = []
    for lora in checkpoint.loras:
        layers = []
        for name in sizes:
            for edit in checkpoint.transformer[name].edits:
                if isinstance(edit, LowRank | Added) and edit.tensors[0].file == lora.file:
                    change = math.sqrt(edit.square() / sizes[name]) if sizes[name] else None
                    rank = edit.rank if isinstance(edit, LowRank) else None
                    layers.append({"tensor": name, "rank": rank, "factor": edit.factor, "relative_change": change})
        out.append({"file": str(lora.file), "scale": lora.scale, "layers": layers})
    return out


def _square(entry: TensorEntry) -> float:
    """Sum of the squares of a tensor's values."""
    rows = entry.shape[0] if entry.shape else 1
    at_once = max(1, rows * 4_000_000 // max(entry.elements, 1))
    pieces = (read_rows(entry, start, min(at_once, rows - start)).float() for start in range(0, rows, at_once))
    return sum(float(piece.norm().double() ** 2) for piece in pieces)


def _read_edits(lora: Lora, transformer: Mapping[str, TensorEntry]) -> list[tuple[str, Edit]]:
    """The edits of one file, by the name of the tensor that each is of."""
    if lora.file.suffix != ".safetensors":
        raise UsageError(
            f"{lora.file}: expected a LoRA in a safetensors file: others may hold code, and are not opened"
        )
    factors = _Factors(lora.file)
    layers = _layers(lora.file, read_header(lora.file))
    edits = list[tuple[str, Edit, TensorEntry]]()
    for layer, found in layers.items():
        edits += _edits_of(lora, layer, found, factors)
    names = _renamed([name for name, _, _ in edits], transformer)
    for name, edit, key in edits:
        _check_fits(lora.file, key, edit, transformer.get(names[name]))
    return [(names[name], edit) for name, edit, _ in edits]


def _layers(file: Path, entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """What a file says of each layer, by role."""
    layers = defaultdict[str, dict[str, TensorEntry]](dict)
    if not entries:
        raise UsageError(f"{file} holds no tensor: expected a LoRA")
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


def _edits_of(
    lora: Lora, layer: str, found: Mapping[str, TensorEntry], factors: "_Factors"
) -> list[tuple[str, Edit, TensorEntry]]:
    """The tensor, the edit, and what it is known by, of each change of a layer."""
    edits = list[tuple[str, Edit, TensorEntry]]()
    up, down = found.get("up"), found.get("down")
    lone = found.get("alpha") or found.get("bias") or up or down
    if (up is None) != (down is None) or (up is None and lone is not None):
        raise UsageError(f"{lora.file}: key '{lone and lone.name}' is not used: expected both halves of a pair")
    if up is not None and down is not None:
        if not (len(up.shape) >= 2 and len(down.shape) >= 2 and up.elements == up.shape[0] * down.shape[0]):
            raise UsageError(
                f"{lora.file}: keys '{up.name}' {list(up.shape)} and '{down.name}' {list(down.shape)} do not fit: "
                "expected [out, rank] and [rank, in]"
            )
        factor = factors.of(layer, down.shape[0], found.get("alpha"))
        edits.append((f"{layer}.weight", LowRank(up, down, lora.scale * factor), up))
        if "bias" in found:
            edits.append((f"{layer}.bias", Added(found["bias"], lora.scale * factor), found["bias"]))
    for role, leaf in WHOLE.items():
        if role in found:
            edits.append((f"{layer}.{leaf}", Added(found[role], lora.scale), found[role]))
    return edits


def _renamed(names: Sequence[str], transformer: Mapping[str, TensorEntry]) -> Mapping[str, str]:
    """Diffusers' names; where all are known already, they are such."""
    theirs = {name: name.replace("modulation", "scale_shift_table") for name in names}
    if all(name in transformer for name in theirs.values()):
        return theirs
    # The conversion tells original names by those of attentions, which a file of other layers lacks.
    mark = "blocks.0.self_attn.q.weight"
    return to_diffusers("transformer", [*dict.fromkeys([*names, mark])])


def _check_fits(file: Path, key: TensorEntry, edit: Edit, entry: TensorEntry | None) -> None:
    if entry is None:
        raise UsageError(f"{file}: key '{key.name}' is of no layer of this model: it is a LoRA of another one")
    expected, found = list(entry.shape), list(key.shape)
    if isinstance(edit, LowRank):
        expected = [expected[0], math.prod(expected[1:])]
        found = [edit.up.shape[0], edit.down.elements // edit.down.shape[0]]
    if math.prod(expected) != math.prod(found) or (isinstance(edit, LowRank) and expected != found):
        raise UsageError(
            f"{file}: key '{key.name}' changes a weight of shape {found}: expected {expected}; "
            "it is a LoRA of another model"
        )
    for tensor in edit.tensors:
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UsageError(f"{file}: key '{tensor.name}' is {tensor.dtype}: expected float32, float16 or bfloat16")


class _Factors:
    """What a file multiplies its pairs with: alpha / rank, by tensors or by diffusers' metadata; 1 if it says none."""

    def __init__(self, file: Path) -> None:
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
