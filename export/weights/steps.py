"""What happens to a weight on its way from the checkpoint to a bundle: frozen steps that work on some rows at a time.

A step says what it makes of a tensor's shape and type, and does it to the rows that are in memory. A new one is a class
here: the stream that reads and writes, and its bound on memory, don't change.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from ...runtime.dtypes import SCALED_DTYPES

__all__ = [
    "TORCH_DTYPES",
    "Cast",
    "JoinedTaps",
    "Matrix",
    "Pick",
    "Reshape",
    "Split",
    "Step",
    "Stored",
    "Straight",
    "Tap",
    "Transpose",
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
class Split(Straight):
    """A matrix [out, in] as several, each of a part of the columns."""

    count: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Matrices [out, in / count]."""
        out, into = given.shape
        return (Stored((out, into // self.count), given.dtype),) * self.count

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The parts of the rows."""
        return tuple(part.contiguous() for part in rows.chunk(self.count, dim=1))


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
class JoinedTaps(Straight):
    """A causal kernel [out, in, kt, kh, kw] as one over the frames that it sees, side by side as channels."""

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A kernel [out, kt · in, kh, kw], the earliest frame first; one of a frame alone stays as it is."""
        out, into, *rest = given.shape
        return (Stored((out, into * math.prod(rest[:-2]), *rest[-2:]), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows, their taps in turn."""
        return (rows if rows.ndim == 4 else rows.transpose(1, 2).flatten(1, 2).contiguous(),)
