"""Which checkpoint something was made from: hashes of the files that hold its weights."""

import hashlib
from collections.abc import Mapping

from ..files import file_digest
from .checkpoint import Checkpoint

__all__ = ["LORA", "checkpoint_digest", "checkpoint_files", "lora_files"]

LORA = "lora"
"""What the names of LoRAs begin with, as those of weights do with their component."""


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file with weights, by COMPONENT/NAME, and of each LoRA, as `lora_files` gives them."""
    files = {
        f"{component}/{file.name}": file_digest(file)
        for component, tensors in checkpoint.components.items()
        for file in sorted({entry.file for entry in tensors.values()})
    }
    return files | lora_files(checkpoint)


def lora_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each LoRA, by lora/NAME:SCALE."""
    return {f"{LORA}/{lora}": file_digest(lora.file) for lora in checkpoint.loras}


def checkpoint_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 of what `checkpoint_files` gives."""
    lines = "\n".join(f"{name} {sha}" for name, sha in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()
