"""Which checkpoint something was made from: hashes of the files that hold its weights."""

import hashlib
from collections.abc import Mapping

from ..files import file_digest
from .checkpoint import Checkpoint

__all__ = ["checkpoint_digest", "checkpoint_files"]


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file with weights, by COMPONENT/NAME."""
    return {
        f"{component}/{file.name}": file_digest(file)
        for component, tensors in checkpoint.components.items()
        for file in sorted({entry.file for entry in tensors.values()})
    }


def checkpoint_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 of what `checkpoint_files` gives."""
    lines = "\n".join(f"{name} {sha}" for name, sha in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()
