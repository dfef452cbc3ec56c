"""What a pyramidal or PPF model adds to a transformer, from files of their own."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.model.safetensors import TensorEntry, read_header
from ..weights.edits import read_tensor
from ..weights.pickled import is_pickle, open_tensors
from .tensors import of_tensor, write_tensors

__all__ = ["FIRST_FRAME", "PATCH_LAYERS", "as_safetensors", "first_frame_entry", "with_patch_layers"]

FIRST_FRAME = "first_frame_embedding"
PATCH_LAYERS = re.compile(r"(?:.*\.)?(patch_embedding|proj_out|head\.head)s?\.(\d+)\.(weight|bias)")
"""A layer of a stage: which, the stage, and the tensor."""


def as_safetensors(file: Path, scratch: Path) -> Path:
    """A file's tensors as safetensors: the file itself, or one that is written of a pickle.

    Raises:
        UsageError: it does not exist, or cannot be read.
    """
    if not file.is_file():
        raise UsageError(f"{file} does not exist: expected a file of weights")
    if not is_pickle(file):
        return file
    out = scratch / f"{file.name}.safetensors"
    tensors = {name: of_tensor(tensor) for name, tensor in open_tensors(file).items()}
    write_tensors(out, tensors, lambda nbytes: None)
    return out


def first_frame_entry(file: Path, width: int) -> TensorEntry:
    """The vector of the first frame [width]: a file's only tensor, or the one that is called so.

    Raises:
        UsageError: there is none, or it is of another width.
    """
    entries = read_header(file)
    named = [entry for name, entry in entries.items() if name.rpartition(".")[2] == FIRST_FRAME]
    found = named or list(entries.values())
    if len(found) != 1:
        raise UsageError(
            f"{file}: expected one tensor, or one called {FIRST_FRAME}, found {', '.join(entries) or 'none'}"
        )
    (entry,) = found
    if not read_tensor(entry).isfinite().all():
        raise UsageError(f"{file}: tensor '{entry.name}' holds numbers that are not finite: it is damaged")
    if entry.elements != width:
        raise UsageError(f"{file}: expected a vector of the model's width, {width}, found {list(entry.shape)}")
    return replace(entry, shape=(width,))


def with_patch_layers(
    file: Path, transformer: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """A transformer's tensors with patch layers for each stage, and those that are left out of it.

    Where the file has none for stage 0, the transformer's own become that stage's.

    Raises:
        UsageError: a tensor of the file is none of a patch layer.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in read_header(file).items():
        match = PATCH_LAYERS.fullmatch(name)
        if match is None:
            raise UsageError(
                f"{file}: expected patch_embedding.STAGE.weight, proj_out.STAGE.weight and their biases, found '{name}'"
            )
        layer, stage, tensor = match.groups()
        found[f"{layer.replace('head.head', 'proj_out')}.{int(stage)}.{tensor}"] = entry
    own = {name: re.sub(r"^(patch_embedding|proj_out)\.(weight|bias)$", r"\1.0.\2", name) for name in transformer}
    kept = {new: transformer[name] for name, new in own.items() if new not in found}
    return kept | found, tuple(name for name, new in own.items() if new in found)
