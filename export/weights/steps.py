"""What happens to a weight on its way from the checkpoint to a bundle: frozen steps that work on some rows at a time.

A step says what it makes of a tensor's shape and type, and does it to the rows that are in memory. A new one is a class
here: the stream that reads and writes, and its bound on memory, don't change.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ...runtime.dtypes import SCALED_DTYPES
from ...runtime.quantisation import Scheme

__all__ = [
    "TORCH_DTYPES",
    "Cast",
    "Integers",
    "JoinedTaps",
    "KernelIntegers",
    "Matrix",
    "Pick",
    "Quantise",
    "Reshape",
    "Step",
    "Stored",
    "Straight",
    "Tap",
    "Transpose",
    "block_integers",
    "channel_integers",
]

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", *SCALED_DTYPES)
}
"""PyTorch's types, by their names in `dtypes.DTYPES`."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class Step(Protocol):
    """One step. Only the last one of a source may give several tensors, or turn rows into columns."""

    @property
    def turns(self) -> bool:
        """Whether rows of what it is given become columns of what it gives."""
        ...

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """What it makes of a whole tensor."""
        ...

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """What it makes of some rows along the first axis, the first of which is number `start`."""
        ...


@dataclass(frozen=True)
class Straight:
    """A step in which rows stay rows."""

    @property
    def turns(self) -> bool:
        """No row becomes a column."""
        return False


@dataclass(frozen=True)
class Cast(Straight):
    """The same values in another number type."""

    dtype: str

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """The same shape, of the other type."""
        return (Stored(given.shape, self.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The values of the rows, each rounded to the nearest."""
        return (rows.to(TORCH_DTYPES[self.dtype]),)


@dataclass(frozen=True)
class Reshape(Straight):
    """The same values, in the same order, in another shape."""

    to: tuple[int, ...]

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """The given shape."""
        return (Stored(self.to, given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows as they are: the order of values is that of the file."""
        return (rows,)


@dataclass(frozen=True)
class Matrix(Straight):
    """A tensor [out, …] as a matrix [out, in]."""

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A matrix [out, in]."""
        return (Stored((given.shape[0], math.prod(given.shape[1:])), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows, flattened."""
        return (rows.reshape(len(rows), -1),)


@dataclass(frozen=True)
class Transpose:
    """A matrix [out, in] as [in, out]."""

    @property
    def turns(self) -> bool:
        """Rows become columns."""
        return True

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A matrix [in, out]."""
        out, into = given.shape
        return (Stored((into, out), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows as columns, contiguous (strides too, of one row)."""
        return (rows.T.clone(memory_format=torch.contiguous_format),)


@dataclass(frozen=True)
class Tap(Straight):
    """One tap in time of a causal kernel [out, in, kt, kh, kw]."""

    index: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A kernel [out, in, kh, kw]."""
        return (Stored((*given.shape[:2], *given.shape[3:]), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The tap of each row."""
        return (rows[:, :, self.index].contiguous(),)


@dataclass(frozen=True)
class Quantise(Straight):
    """A matrix [out, in] as blocks [out, in / block, bytes of a block] and scales [out · in / block].

    They are made by ONNX Runtime's own block quantiser, symmetric around half the range.
    """

    scheme: Scheme

    def _blocks(self, into: int) -> tuple[int, int]:
        """Blocks of a row, and bytes of a block."""
        return -(-into // self.scheme.block), self.scheme.block * self.scheme.bits // 8

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Blocks of values, then their scales."""
        out, into = given.shape
        blocks, size = self._blocks(into)
        return Stored((out, blocks, size), "uint8"), Stored((out * blocks,), "float32")

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Values and scales of the rows."""
        from onnxruntime.capi import _pybind_state as library

        quantise: Any = {4: library.quantize_matmul_4bits, 8: library.quantize_matmul_8bits}[self.scheme.bits]
        count, into = rows.shape
        blocks, size = self._blocks(into)
        values, scales = np.zeros((count, blocks, size), np.uint8), np.zeros(count * blocks, np.float32)
        columns = np.ascontiguousarray(rows.float().numpy().T)
        quantise(values, columns, scales, np.zeros(0, np.uint8), self.scheme.block, count, into, True)
        return torch.from_numpy(values), torch.from_numpy(scales)


@dataclass(frozen=True)
class Pick(Straight):
    """One value of a vector, as a scalar."""

    index: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A scalar."""
        return (Stored((), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The value; a vector of so few is read whole."""
        return (rows[self.index - start],)


@dataclass(frozen=True)
class Integers:
    """A matrix [out, in] as 8-bit integers, transposed or not, and a scale for each output channel [out].

    Symmetric: the largest magnitude of a row becomes `largest`. A row of zeros has the scale 1.
    """

    largest: int
    transposed: bool

    @property
    def turns(self) -> bool:
        """Whether rows become columns."""
        return self.transposed

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Integers, then their scales."""
        out, into = given.shape
        return Stored((into, out) if self.transposed else (out, into), "int8"), Stored((out,), "float32")

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Integers and scales of the rows."""
        integers, scales = channel_integers(rows, self.largest)
        if self.transposed:
            integers = integers.T.clone(memory_format=torch.contiguous_format)
        return integers, scales


@dataclass(frozen=True)
class JoinedTaps(Straight):
    """A causal kernel [out, in, kt, kh, kw] as one over the frames that it sees, side by side as channels."""

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A kernel [out, kt · in, kh, kw], the earliest frame first; one of a frame alone stays as it is."""
        out, into, *rest = given.shape
        return (Stored((out, into * math.prod(rest[:-2]), *rest[-2:]), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows, their taps in turn."""
        return (rows if rows.ndim == 4 else rows.transpose(1, 2).flatten(1, 2).contiguous(),)


@dataclass(frozen=True)
class KernelIntegers(Straight):
    """A kernel [out, …] as 8-bit integers of its shape, and a scale for each output channel; see `Integers`."""

    largest: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Integers, then their scales."""
        return Stored(given.shape, "int8"), Stored(given.shape[:1], "float32")

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Integers and scales of the rows."""
        integers, scales = channel_integers(rows.flatten(1), self.largest)
        return integers.view(rows.shape), scales


def channel_integers(rows: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [out, in] as int8, and a scale for each [out]; see `Integers`."""
    values = rows.float()
    magnitudes = values.abs().amax(dim=1)
    scales = torch.where(magnitudes > 0, magnitudes / largest, 1.0)
    return (values / scales[:, None]).round().clamp(-largest, largest).to(torch.int8), scales


def block_integers(rows: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Rows [out, in] as blocks [out, in / block, bytes of a block], by a scale for each [out · in / block]."""
    half, blocks = 2 ** (scheme.bits - 1), -(-rows.shape[1] // scheme.block)
    padded = torch.nn.functional.pad(rows.float(), (0, blocks * scheme.block - rows.shape[1]))
    by_block = padded.view(len(rows), blocks, scheme.block)
    values = (by_block / scales.view(len(rows), blocks, 1)).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    return values if scheme.bits == 8 else values[..., 0::2] | values[..., 1::2] << 4
