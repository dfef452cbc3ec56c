"""The weights file: every weight once, laid out as the graphs want it, streamed in bounded memory."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.safetensors import TensorEntry
from ...targets.forms import Placement
from ..families.layers import QUANTISED, TORCH_DTYPES, Source

__all__ = ["CHUNK", "FILE_DTYPES", "WeightsPlan", "plan_weights", "write_component"]

CHUNK = 32 * 1024 * 1024
"""Largest piece that is read, in bytes; its conversions hold two more of its size."""

PAGE, CACHE_LINE = 4096, 64
SMALL = 64 * 1024
"""Tensors below this are aligned to a cache line: padding them to pages would cost more than it gives."""

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class WeightsPlan:
    """Where each source lies, and how large the file is."""

    places: Mapping[Source, Placement]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without padding."""
        return sum(place.nbytes for place in self.places.values())

    def lines(self) -> list[str]:
        """The layout, to tell one from another."""
        return [f"{source} {place}" for source, place in self.places.items()]

    def component(self, name: str) -> dict[Source, Placement]:
        """The part of one component."""
        return {source: place for source, place in self.places.items() if source.component == name}


def plan_weights(sources: Iterable[Source]) -> WeightsPlan:
    """Place every source once, in the given order, component by component."""
    places: dict[Source, Placement] = {}
    end = 0
    unique = dict.fromkeys(sources)
    for component in dict.fromkeys(source.component for source in unique):
        for source in unique:
            if source.component == component:
                nbytes = torch.Size(source.shape).numel() * TORCH_DTYPES[source.dtype].itemsize
                alignment = PAGE if nbytes >= SMALL else CACHE_LINE
                offset = -(-end // alignment) * alignment
                places[source] = Placement(offset, nbytes, source.shape, source.dtype)
                end = offset + nbytes
    return WeightsPlan(places, end)


def write_component(
    checkpoint: Checkpoint, plan: WeightsPlan, component: str, file: Path, advance: Callable[[int], None]
) -> None:
    """Write one component's weights at their places in an existing file; `advance` is told the bytes written."""
    tensors = checkpoint.components[component]
    out = os.open(file, os.O_RDWR)
    try:
        for source, place in plan.component(component).items():
            if source.layout.endswith(" scales"):
                continue  # written with their values
            entry = tensors[source.tensor]
            with entry.file.open("rb", buffering=0) as data:
                if source.layout.endswith(" values"):
                    scales = plan.places[_scales_of(source, plan)]
                    _write_quantised(entry, source, place, scales, data.fileno(), out, advance)
                else:
                    _write(entry, source, place, data.fileno(), out, advance)
        os.fsync(out)
    finally:
        os.close(out)


def _write(
    entry: TensorEntry, source: Source, place: Placement, data: int, out: int, advance: Callable[[int], None]
) -> None:
    """Stream one tensor: blocks of rows along its first axis, or the flat values where the layout stays."""
    dtype, wanted = FILE_DTYPES[entry.dtype], TORCH_DTYPES[source.dtype]
    rows = entry.shape[0] if source.layout != "as is" else entry.elements
    row = entry.elements // max(rows, 1)
    step = max(1, CHUNK // max(row * 4, 1))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = _read(entry, data, start * row, count * row, dtype).to(wanted)
        _require_finite(block, entry, wanted)
        if source.layout == "transposed":
            columns = block.view(count, row).T.clone(memory_format=torch.contiguous_format)  # strides too, of one row
            _write_columns(columns, start, rows, place.offset, out)
        else:
            if source.layout.startswith("tap "):
                block = block.view(count, *entry.shape[1:])[:, :, int(source.layout[4:])].contiguous()
            flat = block.flatten()
            per_row = flat.numel() // count
            _pwrite(out, flat, place.offset + start * per_row * wanted.itemsize)
        advance(block.numel() * wanted.itemsize)


def _scales_of(values: Source, plan: WeightsPlan) -> Source:
    layout = values.layout.replace("values", "scales")
    return next(s for s in plan.component(values.component) if s.tensor == values.tensor and s.layout == layout)


def _write_quantised(
    entry: TensorEntry, source: Source, place: Placement, scales: Placement, data: int, out: int,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Quantise one matrix by ONNX Runtime's own block quantiser, some rows at a time."""
    dtype = FILE_DTYPES[entry.dtype]
    quantise, block = _quantiser(source.layout.split()[0])
    rows, into = entry.shape
    per_row = place.nbytes // rows
    blocks = scales.nbytes // 4 // rows
    step = max(1, CHUNK // (into * 4))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        weight = _read(entry, data, start * into, count * into, dtype).float()
        _require_finite(weight, entry, dtype)
        packed = np.zeros((count, blocks, per_row // blocks), np.uint8)
        scale = np.zeros(count * blocks, np.float32)
        columns = np.ascontiguousarray(weight.view(count, into).numpy().T)
        quantise(packed, columns, scale, np.zeros(0, np.uint8), block, count, into, True)
        _pwrite(out, torch.from_numpy(packed), place.offset + start * per_row)
        _pwrite(out, torch.from_numpy(scale), scales.offset + start * blocks * 4)
        advance(packed.nbytes + scale.nbytes)


def _quantiser(precision: str) -> tuple[Any, int]:
    from onnxruntime.capi import _pybind_state as ort

    bits, block = QUANTISED[precision]
    return {4: ort.quantize_matmul_4bits, 8: ort.quantize_matmul_8bits}[bits], block


def _write_columns(block: torch.Tensor, start: int, columns: int, offset: int, out: int) -> None:
    """Columns `start …` of a row-major matrix with `columns` columns."""
    if block.shape[1] == columns:
        _pwrite(out, block.flatten(), offset)
        return
    for index, row in enumerate(block):
        _pwrite(out, row, offset + (index * columns + start) * block.element_size())


def _require_finite(values: torch.Tensor, entry: TensorEntry, dtype: torch.dtype) -> None:
    if values.is_floating_point() and not torch.isfinite(values).all():
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"{entry.file}: tensor '{entry.name}' holds values that are not finite in {name}: mend it, or choose another precision"
        )


def _read(entry: TensorEntry, file: int, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of a tensor from its value number `first` on."""
    offset = entry.offset + first * dtype.itemsize
    data = bytearray(count * dtype.itemsize)
    view = memoryview(data)
    done = 0
    while done < len(data):
        got = os.preadv(file, [view[done:]], offset + done)
        if got == 0:
            raise UsageError(
                f"{entry.file}: expected tensor '{entry.name}' up to byte {offset + len(data)}, found its end at "
                f"{offset + done}: it was cut; fetch it again and run again"
            )
        done += got
    return torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _pwrite(file: int, values: torch.Tensor, offset: int) -> None:
    bytes_of: Any = values.contiguous().view(torch.uint8).numpy()
    view = memoryview(bytes_of)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
