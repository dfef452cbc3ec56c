"""Values of a tensor from its file."""

import os

import torch

from ...runtime.errors import UsageError
from ...runtime.model.safetensors import TensorEntry
from .steps import TORCH_DTYPES

__all__ = ["read_stored"]


def read_stored(entry: TensorEntry, first: int, count: int) -> torch.Tensor:
    """Values [count] of a tensor from its value number `first` on, as they are stored.

    Raises:
        UsageError: the file was cut.
    """
    dtype = TORCH_DTYPES[entry.dtype]
    if not count:
        return torch.empty(0, dtype=dtype)
    offset = entry.offset + first * dtype.itemsize
    values = torch.empty(count, dtype=dtype)
    view, done = values.view(torch.uint8).numpy().data, 0
    with entry.file.open("rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
            if got == 0:
                raise UsageError(
                    f"{entry.file}: expected tensor '{entry.name}' up to byte {offset + len(view)}, found its end at "
                    f"{offset + done}: it was cut; fetch it again and run again"
                )
            done += got
    return values
