"""Values that stay on the device after a run: an output whose rest is the input of the next run."""

import math
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import CheckFailed
from .cuda import Cuda

__all__ = ["DeviceArray", "DeviceMemory"]


class DeviceMemory:
    """Memory of the device, which is freed with the last that refers to it."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        """Allocate it.

        Raises:
            OutOfMemory: the device has too little.
        """
        self.cuda, self.address = cuda, int(cuda.call("cudaMalloc", nbytes))
        weakref.finalize(self, _free, cuda, self.address)


def _free(cuda: Cuda, address: int) -> None:
    with suppress(CheckFailed):
        cuda.call("cudaFree", address)


class DeviceArray:
    """A flat array on the device. A part of it is one too, and keeps the memory of the whole."""

    def __init__(self, memory: DeviceMemory, dtype: str, count: int, first: int = 0) -> None:
        """Take `count` values of memory, from the `first` on; they have been computed."""
        self.memory, self.dtype, self.shape, self.first = memory, np.dtype(dtype), (count,), first

    @property
    def address(self) -> int:
        """Where the first value is."""
        return self.memory.address + self.first * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, part: slice) -> "DeviceArray":
        first, stop, _ = part.indices(*self.shape)
        return DeviceArray(self.memory, self.dtype.name, stop - first, self.first + first)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.empty(self.shape, self.dtype)
        self.memory.cuda.fetch(values, self.address)
        return values if dtype is None else values.astype(dtype, copy=False)
