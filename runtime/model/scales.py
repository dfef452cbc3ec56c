"""Scales of weights in 8-bit floats: each becomes part of the tensor that it is of.

Files name them `LAYER.scale_weight` or `LAYER.weight_scale`, one number or one for each output channel, beside what is
for other engines: scales of inputs, markers, and formats by layer. A scale that nobody applies is a silent white video,
so that one too many or too few is an error.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..dtypes import SCALED_DTYPES, WEIGHT_DTYPES
from ..errors import UsageError
from .safetensors import TensorEntry, is_archive, read_metadata

__all__ = ["Scaled", "fold_scales"]

_SCALES = (".scale_weight", ".weight_scale")
_INPUTS = (".scale_input", ".input_scale")
_MARKER, _FORMAT, _METADATA = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
_MARKER_LIMIT, _FORMAT_LIMIT = 16, 4096
_ADVICE = "fetch the file again, or take one in bf16"


@dataclass(frozen=True)
class Scaled:
    """Values times a scale: a number, or one for each row."""

    by: TensorEntry

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The scale."""
        return (self.by,)


def fold_scales(found: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a file without what belongs to 8-bit floats, each of these with its scale.

    Args:
        found: all tensors, by their names in the file.

    Raises:
        UsageError: a scale is missing, empty, of another shape than its weight, or of no such weight; or the file is in
            a format other than 8-bit floats.
    """
    _check_formats({entry.file for entry in found.values()})
    out, scales = dict[str, TensorEntry](), dict[str, TensorEntry]()
    for name, entry in found.items():
        suffix = next((end for end in _SCALES if name.endswith(end)), None)
        if suffix is not None:
            weight = f"{name.removesuffix(suffix)}.weight"
            if weight in scales:
                raise UsageError(f"{entry.file}: tensors '{scales[weight].name}' and '{name}' scale the same weight")
            scales[weight] = entry
        elif name.endswith(_FORMAT):
            _check_format(entry)
        elif not (name.endswith(_INPUTS) or _is_marker(name, entry)):
            out[name] = entry
    for name, scale in scales.items():
        _check_scale(scale, name, out.get(name))
        out[name] = replace(out[name], edits=(Scaled(scale),))
    bare = next((name for name, entry in out.items() if entry.dtype in SCALED_DTYPES and not entry.edits), None)
    if bare is not None:
        layer = bare.removesuffix(".weight")
        raise UsageError(
            f"{out[bare].file}: tensor '{bare}' is an 8-bit float without a scale: expected '{layer}{_SCALES[0]}' or "
            f"'{layer}{_SCALES[1]}'; {_ADVICE}"
        )
    return out


def _is_marker(name: str, entry: TensorEntry) -> bool:
    return name.rpartition(".")[2] == _MARKER and entry.elements <= _MARKER_LIMIT


def _check_scale(scale: TensorEntry, name: str, weight: TensorEntry | None) -> None:
    if scale.elements == 0:
        raise UsageError(f"{scale.file}: scale '{scale.name}' is empty: expected a number, or one a row; {_ADVICE}")
    if weight is None or weight.dtype not in SCALED_DTYPES:
        found = "there is none" if weight is None else f"found {weight.dtype}"
        raise UsageError(
            f"{scale.file}: scale '{scale.name}' is not used: expected '{name}' in 8-bit floats, {found}; {_ADVICE}"
        )
    rows = weight.shape[0] if weight.shape else 1
    column = (rows, *(1,) * (len(weight.shape) - 1))
    if scale.shape not in ((), (1,), (rows,), (rows, 1), column) or scale.dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"{scale.file}: scale '{scale.name}' is {scale.dtype} {list(scale.shape)}: expected one number, or "
            f"{rows} for the rows of '{name}'"
        )


def _check_formats(files: Iterable[Path]) -> None:
    """Refuse files whose headers speak of other formats."""
    for file in sorted(files):
        text = None if is_archive(file) else read_metadata(file).get(_METADATA)
        if text is None:
            continue
        try:
            layers = json.loads(text).get("layers", {})
            formats = {name: layer.get("format") for name, layer in layers.items()}
        except (ValueError, AttributeError, RecursionError):
            raise UsageError(f"{file}: metadata '{_METADATA}' is malformed: expected formats by layer") from None
        for name, written in formats.items():
            _require_float8(written, f"{file}: layer '{name}'")


def _check_format(entry: TensorEntry) -> None:
    """Refuse a layer whose own marker, JSON in bytes, speaks of another format."""
    where = f"{entry.file}: tensor '{entry.name}'"
    if entry.dtype != "uint8" or entry.elements > _FORMAT_LIMIT:
        raise UsageError(f"{where} is {entry.dtype} {list(entry.shape)}: expected a format as JSON in bytes")
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        text = file.read(entry.nbytes)
    try:
        document: Any = json.loads(text)
        written = document.get("format")
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{where} is malformed: expected a format as JSON in bytes") from None
    _require_float8(written, where)


def _require_float8(written: Any, where: str) -> None:
    if not str(written).startswith("float8"):
        raise UsageError(f"{where} has the format {written}: expected float8_e4m3fn or float8_e5m2; {_ADVICE}")
