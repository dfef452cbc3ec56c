"""Steps that store a matrix, or a kernel, in few bits: values and their scales."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...runtime.errors import UsageError
from ...runtime.quantisation import Scheme
from .steps import TORCH_DTYPES, Step, Stored, Straight

__all__ = [
    "Channels",
    "KernelIntegers",
    "PositiveBlocks",
    "Quantise",
    "block_integers",
    "block_step",
    "channel_step",
    "channel_values",
]


def block_step(scheme: Scheme) -> Step:
    """What makes blocks of a matrix, as a scheme has them."""
    return PositiveBlocks(scheme) if scheme.positive else Quantise(scheme)


def channel_step(scheme: Scheme, *, transposed: bool) -> Step:
    """What gives each output channel of a matrix a scale, as a scheme has them."""
    return Channels(scheme.largest, transposed, scheme.scales, scheme.dtype)


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
class PositiveBlocks(Straight):
    """A matrix [out, in] as blocks [out, in / block, bytes of a block] and scales [out · in / block], all positive.

    Symmetric around half the range: nothing is cut. A block of zeros has the scale 1.
    """

    scheme: Scheme

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Blocks of values, then their scales.

        Raises:
            UsageError: rows are not made of whole blocks.
        """
        if given.shape[1] % self.scheme.block:
            raise UsageError(
                f"{self.scheme.name} takes matrices whose rows are whole blocks of {self.scheme.block}, "
                f"found rows of {given.shape[1]}: take another method"
            )
        values, scales = Quantise(self.scheme).shape(given)
        return values, Stored(scales.shape, self.scheme.scales)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Values and scales of the rows."""
        half, by_block = 2 ** (self.scheme.bits - 1), rows.float().view(-1, self.scheme.block)
        steps = torch.maximum(by_block.amax(dim=1) / (half - 1), -by_block.amin(dim=1) / half)
        scales = torch.where(steps > torch.finfo(torch.float32).tiny, steps, 1.0).to(TORCH_DTYPES[self.scheme.scales])
        return block_integers(rows, scales.float(), self.scheme), scales


@dataclass(frozen=True)
class Channels:
    """A matrix [out, in] as values of 8 bits, transposed or not, and a scale for each output channel [out].

    Symmetric: the largest magnitude of a row becomes `largest`. A row of zeros has the scale 1.
    """

    largest: int
    transposed: bool
    scales: str = "float32"
    dtype: str = "int8"

    @property
    def turns(self) -> bool:
        """Whether rows become columns."""
        return self.transposed

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Values, then their scales."""
        out, into = given.shape
        return Stored((into, out) if self.transposed else (out, into), self.dtype), Stored((out,), self.scales)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Values and scales of the rows."""
        values, scales = channel_values(rows, self.largest, self.scales, self.dtype)
        if self.transposed:
            values = values.T.clone(memory_format=torch.contiguous_format)
        return values, scales


@dataclass(frozen=True)
class KernelIntegers(Straight):
    """A kernel [out, …] as 8-bit integers of its shape, and a scale for each output channel; see `Channels`."""

    largest: int

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """Integers, then their scales."""
        return Stored(given.shape, "int8"), Stored(given.shape[:1], "float32")

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Integers and scales of the rows."""
        integers, scales = channel_values(rows.flatten(1), self.largest)
        return integers.view(rows.shape), scales


def block_integers(rows: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Rows [out, in] as blocks [out, in / block, bytes of a block], by a scale for each [out · in / block]."""
    half, blocks = 2 ** (scheme.bits - 1), -(-rows.shape[1] // scheme.block)
    padded = torch.nn.functional.pad(rows.float(), (0, blocks * scheme.block - rows.shape[1]))
    by_block = padded.view(len(rows), blocks, scheme.block)
    values = (by_block / scales.view(len(rows), blocks, 1)).round().clamp(-half, half - 1).add(half).to(torch.uint8)
    values = values ^ half if scheme.signed else values
    return values if scheme.bits == 8 else values[..., 0::2] | values[..., 1::2] << 4


def channel_values(
    rows: torch.Tensor, largest: int, scales: str = "float32", dtype: str = "int8"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [out, in] in 8 bits, and a scale for each [out]; see `Channels`."""
    kind = TORCH_DTYPES[dtype]
    magnitudes = rows.float().abs().amax(dim=1)
    factors = torch.where(magnitudes > 0, magnitudes / largest, 1.0).to(TORCH_DTYPES[scales])
    values = rows.float() / factors.float()[:, None]
    return (values if kind.is_floating_point else values.round()).clamp(-largest, largest).to(kind), factors
