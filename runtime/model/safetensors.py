"""Headers of safetensors files: names, types, shapes and places of tensors, without reading a weight.

The safetensors library opens a file by mapping it and wants a framework for the tensors; a device has neither
need. Only the header is read here, with `pread`-sized reads, so that inspecting 30 GB costs a few kilobytes.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..dtypes import DTYPES, dtype_of
from ..errors import UsageError
from ..files import check_output, refuse_pointer
from .variants import choose_weights

__all__ = [
    "Edit",
    "TensorEntry",
    "check_tensors_output",
    "is_archive",
    "read_header",
    "read_metadata",
    "read_tensors",
    "shards_of",
]

_HEADER_LIMIT = 100_000_000
_ARCHIVE = b"PK"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Edit(Protocol):
    """What becomes of a tensor's values wherever they are read: a scale, or a change; see `edits`."""

    @property
    def tensors(self) -> "tuple[TensorEntry, ...]":
        """Where its numbers lie."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what becomes of its values."""

    file: Path
    name: str
    """Its name in the file; a reader may know the tensor by another one."""
    dtype: str
    """Its name in `dtypes.DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """Place of its first byte, from the start of the file."""
    edits: tuple[Edit, ...] = ()
    """In order."""

    @property
    def values(self) -> str:
        """Number type of its values: where they are edited, float32."""
        return "float32" if self.edits else self.dtype

    @property
    def files(self) -> frozenset[Path]:
        """All files that its values come from."""
        return frozenset((self.file, *(tensor.file for edit in self.edits for tensor in edit.tensors)))

    def last_rows(self, count: int = 0) -> "TensorEntry":
        """The last rows along the first axis, or all where there are no more; a scalar as it is."""
        if not self.shape:
            return self
        rows, *rest = self.shape
        skipped = max(0, rows - count)
        start = self.offset + skipped * math.prod(rest) * DTYPES[self.dtype].nbytes
        return replace(self, shape=(rows - skipped, *rest), offset=start)

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.elements * DTYPES[self.dtype].nbytes


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file.

    Raises:
        UsageError: the file is truncated, or its header is not one of a safetensors file.
    """
    size = path.stat().st_size
    text = _header_text(path, size)
    length = len(text)
    try:
        header = json.loads(text)
        entries = {
            name: _entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} has a malformed safetensors header ({error}); fetch it again") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise UsageError(
                f"{path} has a malformed safetensors header (tensor '{name}' overlaps or leaves a gap); fetch it again"
            )
        end += entry.nbytes
    if end != size:
        raise UsageError(f"{path} is truncated or overlong: expected {end} bytes, found {size}; fetch it again")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors."""
    metadata = json.loads(_header_text(path, path.stat().st_size)).get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def check_tensors_output(path: Path, kind: str) -> None:
    """Refuse, before the work, an output that cannot be written, or would replace tensors of another kind.

    Args:
        path: the output.
        kind: what it is: a key of its metadata, such as "trace".

    Raises:
        UsageError: a model's weights are there, or anything else.
    """
    check_output(path)
    if not path.exists():
        return
    try:
        own = kind in read_metadata(path)
    except (UsageError, ValueError, RecursionError):
        own = False
    if not own:
        raise UsageError(f"{path} exists and is no {kind}: choose another output, or remove it")


def is_archive(path: Path) -> bool:
    """Whether a file is one of `torch.save` by how it begins, which the export reads, and nothing in the runtime."""
    with path.open("rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


def _header_text(path: Path, size: int) -> bytes:
    refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(_ARCHIVE):
            raise UsageError(f"{path} is a pickle of PyTorch: expected safetensors, which `pyrexport init` makes of it")
        if len(start) < 8 or length > _HEADER_LIMIT or 8 + length > size:
            raise UsageError(
                f"{path} is not a whole safetensors file: the header does not fit in its {size} bytes; fetch it again"
            )
        return file.read(length)


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor '{name}': shape and offsets are whole numbers")
    try:
        dtype = dtype_of(value["dtype"]).name
    except KeyError:
        raise ValueError(f"tensor '{name}': unsupported dtype {value['dtype']}") from None
    entry = TensorEntry(path, name, dtype, shape, base + begin)
    if entry.nbytes != end - begin:
        raise ValueError(f"tensor '{name}': {end - begin} bytes for shape {list(shape)} of {entry.dtype}")
    return entry


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> dict[str, TensorEntry]:
    """Entries of a component's weights.

    They lie in `STEM.safetensors`, in the shards that `STEM.safetensors.index.json` names, or in the same files of a
    variant: see `choose_weights`.

    Raises:
        UsageError: no safetensors weights, only pickles, none of the variant, a missing or broken shard, or an index
            that disagrees with its shards.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    lost = [path for path in folder.iterdir() if path.is_symlink() and not path.exists()] if folder.is_dir() else []
    if lost:
        raise UsageError(
            f"{lost[0]} leads to {lost[0].readlink()}, which is not there: put it back, or make the checkpoint "
            "again with init --copy"
        )
    chosen = choose_weights(names, stem, variant, folder)
    if chosen is not None:
        file = folder / chosen
        return _read_sharded(file) if file.suffix == ".json" else read_header(file)
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise UsageError(
            f"{folder} holds a pickle ({pickles[0]}), which is never opened: expected {stem}.safetensors; "
            "save the model with safe_serialization=True"
        )
    raise UsageError(f"no weights in {folder}: expected {stem}.safetensors or {stem}.safetensors.index.json")


def shards_of(index: Path) -> dict[str, str]:
    """The shard of each tensor that an index names.

    Raises:
        UsageError: it is malformed, or names a file elsewhere.
    """
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        if any("/" in name or "\\" in name or not name.endswith(".safetensors") for name in weight_map.values()):
            raise ValueError("a shard is a .safetensors file in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_pointer(index)
        raise UsageError(f"{index} is malformed ({error}): expected a 'weight_map' of tensor names to shards") from None
    return weight_map


def _read_sharded(index: Path) -> dict[str, TensorEntry]:
    weight_map = shards_of(index)
    tensors: dict[str, TensorEntry] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise UsageError(f"shard {shard} is missing: {index.name} names it; fetch it again")
        found = read_header(shard)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if found.keys() != expected:
            odd = sorted(found.keys() ^ expected)[0]
            raise UsageError(f"{shard} and {index.name} disagree about tensor '{odd}'; fetch both again")
        tensors |= found
    return tensors
