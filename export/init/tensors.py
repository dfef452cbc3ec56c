"""Writing safetensors files tensor by tensor, in pieces: nothing is held whole."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...runtime.dtypes import DTYPES
from ...runtime.files import sync_file
from ...runtime.model.safetensors import TensorEntry
from ..weights.edits import read_rows
from ..weights.steps import TORCH_DTYPES
from .documents import write_json

__all__ = ["Streamed", "of_entry", "of_tensor", "write_index", "write_tensors"]

PIECE = 16 * 1024 * 1024
"""Values that are held at once."""


@dataclass(frozen=True)
class Streamed:
    """A tensor to write."""

    dtype: str
    """A name of `TORCH_DTYPES`."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]
    """Its bytes, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


def of_entry(entry: TensorEntry, shape: tuple[int, ...] | None = None) -> Streamed:
    """A tensor of another file, with its edits made; reshaped where a shape is given."""
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, PIECE * rows // max(entry.elements, 1))

    def pieces() -> Iterator[bytes]:
        for start in range(0, rows, step):
            yield _bytes(read_rows(entry, start, min(step, rows - start)))

    return Streamed(entry.values, entry.shape if shape is None else shape, pieces)


def of_tensor(tensor: torch.Tensor) -> Streamed:
    """A tensor in memory, or mapped."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}

    def pieces() -> Iterator[bytes]:
        flat = tensor.contiguous().view(-1)
        for start in range(0, flat.numel(), PIECE):
            yield _bytes(flat[start : start + PIECE])

    return Streamed(names[tensor.dtype], tuple(tensor.shape), pieces)


def _bytes(values: torch.Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(file: Path, tensors: Mapping[str, Streamed], advance: Callable[[int], None]) -> None:
    """Write one safetensors file, durably.

    Args:
        file: what to write.
        tensors: by name, in order.
        advance: told the bytes of each piece.
    """
    end, header = 0, dict[str, Any](__metadata__={"format": "pt"})
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        code = DTYPES[tensor.dtype].safetensors
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                out.write(piece)
                advance(len(piece))
    sync_file(file)


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Write the index of a component's shards.

    Args:
        folder: the component's.
        stem: what its weights' names begin with.
        weight_map: the file of each tensor.
        nbytes: of all tensors.
    """
    document = {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)}
    write_json(folder / f"{stem}.safetensors.index.json", document)
