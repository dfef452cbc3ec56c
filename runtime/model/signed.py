"""Safetensors files that carry a hash of all that is in them: a JSON document, and arrays."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import UsageError
from ..files import written_beside
from .safetensors import read_header, read_metadata

__all__ = ["Arrays", "content_hash", "read_signed", "write_signed"]

Arrays = Mapping[str, NDArray[Any]]


def content_hash(document: Mapping[str, Any], arrays: Arrays) -> str:
    """SHA-256 of a document and of each array's name, type, shape and bytes, whatever their order."""
    digest = hashlib.sha256(_dump(document).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_signed(path: Path, key: str, document: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a file, durable before it is there; the same content gives the same bytes.

    Args:
        path: of the file.
        key: what the metadata calls the document.
        document: of JSON's types, finite numbers only.
        arrays: of types that `DTYPES` names.
    """
    header: dict[str, Any] = {"__metadata__": {key: _dump(document), "hash": content_hash(document, arrays)}}
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))  # each aligned to its own size
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        code = DTYPES[array.dtype.name].safetensors
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_beside(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).tobytes())


def read_signed(path: Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The document and the arrays of a file.

    Args:
        path: of the file.
        key: what the metadata calls the document.
        what: it should be, for errors.

    Raises:
        UsageError: the file is missing, is damaged or of another purpose, or was changed since it was written.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: expected {what}")
    entries, metadata = read_header(path), read_metadata(path)
    if key not in metadata:
        raise UsageError(f"{path} is not {what}")
    try:
        document = json.loads(metadata[key])
        if not isinstance(document, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not {what}: its description is malformed ({error})") from None
    arrays = {}
    for name, entry in entries.items():
        values = np.fromfile(path, DTYPES[entry.dtype].storage, math.prod(entry.shape), offset=entry.offset)
        arrays[name] = values.reshape(entry.shape)
    if content_hash(document, arrays) != metadata.get("hash"):
        raise UsageError(f"{path} was changed since it was made: its content is not what its hash says; make it again")
    return document, arrays


def _dump(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)
