"""LoRA files, in the dialects that trainers write, as edits of the transformer's tensors.

A key is a prefix, a layer in Wan's original names or diffusers', and a suffix that says what it is. All keys of a file
are used, or it is refused.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.dtypes import WEIGHT_DTYPES
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint, Lora
from ...runtime.model.safetensors import Edit, TensorEntry, read_header
from .dialects import WHOLE, Factors, layers_of
from .edits import Added, LowRank, read_rows
from .names import to_diffusers

__all__ = ["TRANSFORMERS", "merge_loras", "parse_lora", "read_changes"]

TRANSFORMERS = ("transformer", "transformer_2")
"""Components that a LoRA can be of."""


def parse_lora(text: str) -> Lora:
    """A LoRA as [COMPONENT=]FILE[:SCALE].

    Raises:
        UsageError: the file is not there, or the scale is not a number.
    """
    component, equals, rest = text.partition("=")
    if equals and component in TRANSFORMERS:
        return replace(parse_lora(rest), component=component)
    if equals and component.startswith("transformer") and not Path(text).exists():
        raise UsageError(f"--lora {text}: expected a LoRA of {' or '.join(TRANSFORMERS)}, found '{component}'")
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
    """The checkpoint with LoRAs merged into its transformers, each tensor as it is read.

    Raises:
        UsageError: a key of a file is not used, is of another model, or of a method that is not supported.
    """
    if not loras:
        return checkpoint
    edited = {name: dict(checkpoint.components[name]) for name in TRANSFORMERS if name in checkpoint.components}
    given = list[tuple[str, Path]]()
    for lora in loras:
        own = (lora.component, lora.file.resolve())
        if own in given:
            raise UsageError(f"{lora.file} is given twice: give it once, with the sum of its scales")
        given.append(own)
        for component, entries in _by_component(lora, read_header(_safetensors(lora.file))).items():
            if component not in edited:
                raise UsageError(
                    f"{lora.file}: key '{next(iter(entries.values())).name}' is of the second of two networks "
                    f"({component}), which {checkpoint.folder} has not: it is a LoRA of another model"
                )
            tensors = edited[component]
            for name, edit in _read_edits(lora, entries, checkpoint.components[component]):
                tensors[name] = replace(tensors[name], edits=(*tensors[name].edits, edit))
    merged = replace(checkpoint, transformer=edited["transformer"], loras=(*checkpoint.loras, *loras))
    return replace(merged, transformer_2=edited["transformer_2"]) if "transformer_2" in edited else merged


def read_changes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Of each LoRA: the tensors that it changes, with rank, scale and norm of the change against that of the weight.

    Reads every changed tensor once, a piece at a time.
    """
    sizes = {
        (component, name): _square(
            replace(entry, edits=tuple(e for e in entry.edits if not isinstance(e, LowRank | Added)))
        )
        for component in TRANSFORMERS
        for name, entry in checkpoint.components.get(component, {}).items()
        if any(isinstance(e, LowRank | Added) for e in entry.edits)
    }
    out = []
    for lora in checkpoint.loras:
        layers = []
        for (component, name), size in sizes.items():
            for edit in checkpoint.components[component][name].edits:
                if isinstance(edit, LowRank | Added) and edit.tensors[0].file == lora.file:
                    change = math.sqrt(edit.square() / size) if size else None
                    rank = edit.rank if isinstance(edit, LowRank) else None
                    place = {"component": component, "tensor": name}
                    layers.append(place | {"rank": rank, "factor": edit.factor, "relative_change": change})
        out.append({"file": str(lora.file), "scale": lora.scale, "layers": layers})
    return out


def _square(entry: TensorEntry) -> float:
    """Sum of the squares of a tensor's values."""
    rows = entry.shape[0] if entry.shape else 1
    at_once = max(1, rows * 4_000_000 // max(entry.elements, 1))
    pieces = (read_rows(entry, start, min(at_once, rows - start)).float() for start in range(0, rows, at_once))
    return sum(float(piece.norm().double() ** 2) for piece in pieces)


def _safetensors(file: Path) -> Path:
    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: expected a LoRA in a safetensors file: others may hold code, and are not opened")
    return file


def _by_component(lora: Lora, entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """A file's tensors by the network that they change: their keys may say the second, and else the user does."""
    if not entries:
        raise UsageError(f"{lora.file} holds no tensor: expected a LoRA")
    found = defaultdict[str, dict[str, TensorEntry]](dict)
    for key, entry in entries.items():
        own = key.startswith(f"{TRANSFORMERS[1]}.")
        found[TRANSFORMERS[1] if own else lora.component][key.removeprefix(f"{TRANSFORMERS[1]}.")] = entry
    return found


def _read_edits(
    lora: Lora, entries: Mapping[str, TensorEntry], transformer: Mapping[str, TensorEntry]
) -> list[tuple[str, Edit]]:
    """The edits of one file's tensors, by the name of the tensor that each is of."""
    factors = Factors(lora.file)
    layers = layers_of(lora.file, entries)
    edits = list[tuple[str, Edit, TensorEntry]]()
    for layer, found in layers.items():
        edits += _edits_of(lora, layer, found, factors)
    if not edits:
        raise UsageError(f"{lora.file} changes nothing: expected a LoRA of this model, not of its image layers alone")
    names, spelled = _renamed([name for name, _, _ in edits], transformer), dict[str, str]()
    for name, edit, key in edits:
        other = spelled.setdefault(names[name], name)
        if other != name:
            raise UsageError(f"{lora.file}: '{other}' and '{name}' are one tensor in two spellings: expected one")
        _check_fits(lora.file, key, edit, transformer.get(names[name]))
    return [(names[name], edit) for name, edit, _ in edits]


def _edits_of(
    lora: Lora, layer: str, found: Mapping[str, TensorEntry], factors: Factors
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
    found = to_diffusers("transformer", [*dict.fromkeys([*names, mark])])
    # Helios has the table of Wan's head in its last norm.
    return {name: new if new in transformer else f"norm_out.{new}" for name, new in found.items()}


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
