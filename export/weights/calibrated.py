"""Steps whose numbers are a recipe's: what moves outliers from activations to weights, and scales that were searched.

Each holds the place of its numbers in the recipe's file and reads them when it works.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ...runtime.model.safetensors import TensorEntry
from ...runtime.quantisation import Scheme
from .quantising import Quantise, block_integers
from .steps import Stored, Straight

__all__ = ["Bounds", "Columns", "JointScale", "Rows", "SearchedBlocks", "read_values"]


def read_values(entry: TensorEntry, start: int = 0, count: int | None = None) -> torch.Tensor:
    """Values of a float32 tensor of a recipe, from its value number `start` on."""
    count = entry.elements - start if count is None else count
    return torch.from_numpy(np.fromfile(entry.file, np.float32, count, offset=entry.offset + 4 * start))


@dataclass(frozen=True)
class _Migrated(Straight):
    """A tensor that a vector of a recipe scales."""

    by: TensorEntry

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """The same shape, in float32."""
        return (Stored(given.shape, "float32"),)


class Columns(_Migrated):
    """A matrix [out, in] whose columns are multiplied by a vector [in]: the input of its product is divided by it."""

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows, multiplied."""
        return (rows.float() * read_values(self.by),)


class Rows(_Migrated):
    """A tensor [out, …] whose rows are divided by a vector [out]: its product is the input of a layer that asks so."""

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The rows, divided."""
        divisors = read_values(self.by, start, len(rows))
        return (rows.float() / divisors.view(-1, *(1,) * (rows.ndim - 1)),)


@dataclass(frozen=True)
class JointScale(Straight):
    """Scales of all stages [stages] as the one of integers, or floats, that are symmetric around zero.

    The greatest magnitude that integers from 0 to 255 hold in any stage becomes `largest`.
    """

    zeros: TensorEntry
    largest: float

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A scalar."""
        return (Stored((), given.dtype),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The scale; a vector of so few is read whole."""
        zeros = read_values(self.zeros)
        magnitudes = rows.float() * torch.maximum(zeros, 255 - zeros)
        return ((magnitudes.amax() / self.largest).to(rows.dtype),)


@dataclass(frozen=True)
class Bounds(Straight):
    """A matrix [out, in] as what the magnitude of its products cannot exceed in a stage [out].

    Inputs are those that a recipe has seen, each channel within its own range.
    """

    lowest: TensorEntry
    highest: TensorEntry
    stage: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """A vector."""
        return (Stored(given.shape[:1], "float32"),)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """The bounds of the rows."""
        _, groups, width = self.lowest.shape
        at = self.stage * groups * width, groups * width
        ends = torch.stack([read_values(entry, *at).view(groups, width) for entry in (self.lowest, self.highest)])
        return (rows.float().abs() @ ends.abs().amax(dim=(0, 1)),)


@dataclass(frozen=True)
class SearchedBlocks(Straight):
    """A matrix [out, in] as blocks, as `Quantise` makes them, by the scales [out · blocks] of a recipe."""

    scheme: Scheme
    scales: TensorEntry

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Blocks of values, then their scales."""
        return Quantise(self.scheme).shape(given)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Values and scales of the rows."""
        blocks = -(-rows.shape[1] // self.scheme.block)
        scales = read_values(self.scales, start * blocks, len(rows) * blocks)
        return block_integers(rows, scales, self.scheme), scales
