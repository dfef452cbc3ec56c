"""Changes of a tensor's values, made as they are read, some rows at a time: the scale of an 8-bit float, and LoRA."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...runtime.model.safetensors import Edit, TensorEntry
from ...runtime.model.scales import Scaled
from .reading import read_stored

__all__ = ["Added", "LowRank", "read_rows", "read_tensor"]


@dataclass(frozen=True)
class LowRank:
    """Values plus `factor`·up·down, of a weight [out, …] as a matrix: up [out, rank], down [rank, in]."""

    up: TensorEntry
    down: TensorEntry
    factor: float

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Both matrices."""
        return (self.up, self.down)

    @property
    def rank(self) -> int:
        """Of the change."""
        return self.down.shape[0]

    def square(self) -> float:
        """Sum of the squares of `factor`·up·down, by the Gram matrices of both."""
        up, down = (_matrix(entry, 0, entry.shape[0]).double() for entry in self.tensors)
        return self.factor**2 * float(((up.T @ up) * (down @ down.T)).sum())


@dataclass(frozen=True)
class Added:
    """Values plus `factor` times as many others."""

    delta: TensorEntry
    factor: float

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The others."""
        return (self.delta,)

    def square(self) -> float:
        """Sum of the squares of what is added."""
        values = read_stored(self.delta, 0, self.delta.elements).double()
        return self.factor**2 * float((values**2).sum())


def read_rows(entry: TensorEntry, start: int, count: int) -> torch.Tensor:
    """Rows [count, …] of a tensor along its first axis, as they are stored; edited ones in float32.

    Raises:
        UsageError: the file was cut.
    """
    row = entry.elements // max(entry.shape[0] if entry.shape else 1, 1)
    rows = read_stored(entry, start * row, count * row).view(count, *entry.shape[1:])
    for edit in entry.edits:
        rows = _edited(rows.float(), edit, start)
    return rows


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A whole tensor, in float32.

    Raises:
        UsageError: the file was cut.
    """
    return read_rows(entry, 0, entry.shape[0] if entry.shape else 1).view(entry.shape).float()


def _edited(rows: torch.Tensor, edit: Edit, start: int) -> torch.Tensor:
    """Float32 rows, the first of which is number `start`, changed in place."""
    match edit:
        case Scaled(by):
            one = by.elements == 1
            scale = read_stored(by, 0 if one else start, 1 if one else len(rows)).float()
            return rows.mul_(scale.view(-1, *(1,) * (rows.ndim - 1)))
        case LowRank(up, down, factor):
            flat = rows.view(len(rows), -1)
            flat.addmm_(_matrix(up, start, len(rows)), _whole(down), alpha=factor)
            return rows
        case Added(delta, factor):
            row = rows.numel() // len(rows)
            values = read_stored(delta, start * row, len(rows) * row).float()
            return rows.add_(values.view(rows.shape), alpha=factor)
    raise TypeError(f"no way to make {type(edit).__name__} of a tensor")


@lru_cache(maxsize=1)
def _whole(entry: TensorEntry) -> torch.Tensor:
    """A tensor as a matrix; kept, since the rows of a weight come piece after piece."""
    return _matrix(entry, 0, entry.shape[0])


def _matrix(entry: TensorEntry, start: int, count: int) -> torch.Tensor:
    """Rows of a tensor as those of a matrix, in float32."""
    row = entry.elements // entry.shape[0]
    return read_stored(entry, start * row, count * row).view(count, row).float()
