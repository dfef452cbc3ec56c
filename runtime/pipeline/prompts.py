"""Embeddings of prompts that were encoded before, in the user's cache folder."""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.graphs import TEXT
from ..bundle.manifest import Manifest
from ..errors import UsageError
from ..files import cache_folder, is_partial, written_beside

__all__ = ["MOST_BYTES", "PromptCache", "encoder_hash"]

MOST_BYTES = 256 * 1024 * 1024
"""What the cache may hold: those that were not used for the longest time are removed."""

Array = NDArray[np.float32]


def encoder_hash(manifest: Manifest) -> str:
    """What tells a bundle's text encoder from others: its weights, how they are stored, its graphs and its engine."""
    files: Mapping[str, str] = manifest.provenance.get("checkpoint", {}).get("files", {})
    graphs = [entry for key, entry in manifest.graphs.items() if key.role == TEXT]
    document: dict[str, Any] = {
        "weights": {name: sha for name, sha in files.items() if name.startswith("text_encoder/")},
        "scheme": manifest.scheme("text_encoder").name,
        "graphs": {entry.spec.name: manifest.files[entry.file].sha256 for entry in graphs},
        "engine": [manifest.target, manifest.engine, manifest.engine_version, manifest.compute],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


class PromptCache:
    """Embeddings by the tokens of their prompts, of one text encoder.

    A file holds a SHA-256 of its name and of what follows, then a .npy: one that was cut, or renamed from another
    encoder's, is not taken.
    """

    def __init__(self, encoder: str) -> None:
        """The cache of an encoder, by its `encoder_hash`."""
        self.folder, self.encoder = cache_folder() / "prompts", encoder
        self.warnings: list[str] = []
        """Why it could not be used, a line each."""

    def get(self, ids: Sequence[int], shape: tuple[int, int]) -> Array | None:
        """Embeddings of tokens, of a shape; None where they are not there, or are not what they should be."""
        file = self._file(ids)
        try:
            found = _read(file, shape)
        except OSError:  # it is encoded again, and keeping that says what is in the way
            return None
        except ValueError as error:
            self.warnings.append(f"{file} is ignored: {error}")
            return None
        with suppress(OSError):
            os.utime(file)
        return found

    def put(self, ids: Sequence[int], embeddings: Array) -> None:
        """Keep the embeddings of tokens, and no more than `MOST_BYTES` of all."""
        file, buffer = self._file(ids), io.BytesIO()
        np.save(buffer, embeddings)
        data = buffer.getvalue()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_beside(file, durable=False) as partial:
                partial.write_bytes(_digest(file, data) + data)
            self._bound(file)
        except (OSError, UsageError) as error:
            self.warnings.append(f"embeddings of prompts are not kept: {error}")

    def _file(self, ids: Sequence[int]) -> Path:
        text = f"{self.encoder} {' '.join(map(str, ids))}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.embeddings"

    def _bound(self, newest: Path) -> None:
        found = [(path.stat(), path) for path in self.folder.iterdir() if path != newest and not is_partial(path.name)]
        left = MOST_BYTES - newest.stat().st_size
        for status, path in sorted(found, key=lambda each: -each[0].st_mtime_ns):
            left -= status.st_size
            if left < 0:
                path.unlink(missing_ok=True)


def _read(file: Path, shape: tuple[int, int]) -> Array:
    data = file.read_bytes()
    if data[:32] != _digest(file, data[32:]):
        raise ValueError("it is damaged, or another encoder's")
    found: Array = np.load(io.BytesIO(data[32:]), allow_pickle=False)
    if found.shape != shape or found.dtype != np.float32:
        raise ValueError(f"expected float32 {list(shape)}, found {found.dtype} {list(found.shape)}")
    return found


def _digest(file: Path, data: bytes) -> bytes:
    return hashlib.sha256(file.name.encode() + data).digest()
