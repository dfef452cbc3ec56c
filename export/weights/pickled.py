"""Tensors of a PyTorch file, which is a pickle: opened only where it holds tensors and nothing else."""

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...runtime.errors import UsageError
from ...runtime.files import refuse_pointer
from ...runtime.model.safetensors import TensorEntry, is_archive, read_header
from .steps import TORCH_DTYPES

__all__ = ["PICKLES", "is_pickle", "open_tensors", "read_any_header"]

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""How the names of such files end."""

LARGEST = 256 * 1024 * 1024
"""Bytes of a pickle beside its tensors above which it is no list of tensors."""

STORAGES = ("Float", "Half", "BFloat16", "Double", "Char", "Byte", "Short", "Int", "Long", "Bool")
GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch.storage UntypedStorage",
        *(f"torch {name}Storage" for name in STORAGES),
        *(str(dtype).replace(".", " ") for dtype in TORCH_DTYPES.values()),
    }
)
"""What a pickle of tensors calls, and nothing else."""

OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"})
"""Other ways of a pickle to name or make objects, which `torch.save` has no need of."""


LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""Of a record of a zip archive; the last two are the lengths of a name and of what else follows."""


def is_pickle(path: Path) -> bool:
    """Whether a file is one, by its name or by how it begins."""
    if path.suffix.lower() in PICKLES:
        return True
    return is_archive(path)


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save`, mapped. Nothing of it is executed before it is known to be tensors alone.

    Raises:
        UsageError: it is no such file, is of the format before PyTorch 1.6, is damaged, names anything but tensors, or
            holds something else beside them.
    """
    _load_places(path)
    return _load(path, mmap=True)


def read_any_header(path: Path) -> dict[str, TensorEntry]:
    """Where the tensors of a file lie: one of safetensors, or of `torch.save`, which holds them as they are too.

    Raises:
        UsageError: it is neither, is damaged, or a tensor's values do not lie one after the other.
    """
    if not is_pickle(path):
        return read_header(path)
    found, size = _load_places(path), path.stat().st_size
    names, entries = {dtype: name for name, dtype in TORCH_DTYPES.items()}, dict[str, TensorEntry]()
    for name, value in found.items():
        if not value.is_contiguous():
            raise UsageError(f"{path}: the values of tensor '{name}' lie scattered: save it again as contiguous()")
        storage: Any = value.untyped_storage()
        offset = storage._checkpoint_offset + value.storage_offset() * value.dtype.itemsize
        entry = TensorEntry(path, name, names[value.dtype], tuple(value.shape), offset)
        if offset + entry.nbytes > size:
            raise UsageError(f"{path} is truncated: tensor '{name}' ends behind it; fetch it again")
        entries[name] = entry
    return entries


def _load_places(path: Path) -> dict[str, torch.Tensor]:
    """Tensors without values, whose storages know where they lie.

    PyTorch reckons that from their sizes, as `torch.save` writes them, and never looks at how long a record is: of an
    archive that was packed again, or lost one, it would take other values.
    """
    with FakeTensorMode():
        found = _load(path)
    records = _records(path)
    for name, value in found.items():
        storage: Any = value.untyped_storage()
        if records.get(storage._checkpoint_offset) != storage.nbytes():
            raise UsageError(
                f"{path}: the values of tensor '{name}' are not where torch.save puts them: it is damaged, or was "
                "packed again; fetch it again"
            )
    return found


def _records(path: Path) -> dict[int, int]:
    """Bytes of each record of an archive, by where they begin in the file: behind a header of their own."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset)
            *_, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            found[info.header_offset + LOCAL_HEADER.size + name + extra] = info.file_size
    return found


def _load(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    refuse_pointer(path)
    if path.suffix == ".safetensors":  # PyTorch goes by the name
        raise UsageError(f"{path} is a file of torch.save, whatever its name says: rename it to {path.stem}.pth")
    _check_calls(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # whatever PyTorch raises on a file that it cannot read
        raise UsageError(
            f"{path}: PyTorch cannot read it ({str(error).splitlines()[0]:.200}); fetch it again"
        ) from None
    if isinstance(found, torch.Tensor):
        found = {"tensor": found}
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected tensors by their names, found one {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UsageError(
                f"{path}: expected tensors alone, found {name!r:.60} of type {type(value).__name__}: "
                "save the dictionary of the model's tensors by itself"
            )
        if value.layout != torch.strided or value.dtype not in TORCH_DTYPES.values():
            raise UsageError(f"{path}: tensor '{name}' is of {value.dtype}, which no weight here is stored in")
    return {name: value.detach() for name, value in found.items()}


def _instead(path: Path) -> str:
    """What to do with a file that is none of `torch.save`."""
    try:
        read_header(path)
    except UsageError:
        return "expected one, or safetensors"
    return f"it holds safetensors; rename it to {path.stem}.safetensors"


def _check_calls(path: Path) -> None:
    """Read the pickle's opcodes, and refuse one that calls anything that tensors do not need."""
    try:
        with zipfile.ZipFile(path) as archive:
            lists = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            if len(lists) != 1:
                raise ValueError(f"expected one data.pkl, found {len(lists) or 'none'}")
            (name,) = lists
            if archive.getinfo(name).file_size > LARGEST:
                raise ValueError("its list of tensors is too long")
            compressed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            if compressed:
                raise ValueError(f"{compressed[0]:.60} is compressed, which torch.save does not do")
            order = {entry.rpartition("/")[2]: entry for entry in archive.namelist()}.get("byteorder")
            if order is not None and archive.read(order) != b"little":
                raise ValueError("its numbers have their largest byte first")
            opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(archive.read(name))]
    except zipfile.BadZipFile:
        raise UsageError(
            f"{path} is no file of torch.save as it has been since PyTorch 1.6: {_instead(path)}"
        ) from None
    except Exception as error:  # a pickle is anybody's: whatever its opcodes cannot be read for
        raise UsageError(f"{path}: its list of tensors cannot be read ({error}); fetch it again") from None
    for name, argument in opcodes:
        called = str(argument).replace(" ", ".") if name == "GLOBAL" else name
        if name in OPCODES or (name == "GLOBAL" and argument not in GLOBALS):
            raise UsageError(
                f"{path} holds more than tensors (its pickle has {called:.80}): it is not opened; "
                "save its tensors by themselves"
            )
