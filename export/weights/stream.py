"""Weights from a checkpoint to their places in a file, streamed in bounded memory."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...runtime.errors import UsageError
from ...runtime.model.safetensors import TensorEntry
from ...targets.forms import Placement
from .edits import read_rows
from .places import Places
from .source import Source
from .steps import Step

__all__ = ["CHUNK", "write_component"]

WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types that a value can leave by growing; smaller ones are only taken with scales."""

CHUNK = 32 * 1024 * 1024
"""Largest piece that is read, in bytes of float32; its conversions hold two more of its size."""


def write_component(
    tensors: Mapping[str, TensorEntry], places: Places, component: str, file: Path, advance: Callable[[int], None]
) -> None:
    """Write one component's weights at their places in an existing file.

    Args:
        tensors: the component's tensors in the checkpoint.
        places: where weights lie in the file.
        component: the component whose weights are written.
        file: a file as large as its places say.
        advance: told the bytes as they are written.

    Raises:
        UsageError: a tensor was cut, or holds values that are not finite as they are stored.
    """
    groups: dict[tuple[str, tuple[Step, ...]], dict[int, Placement]] = {}
    for source, place in places.component(component).items():
        groups.setdefault(_made_together(source), {})[source.output] = place
    out = os.open(file, os.O_RDWR)
    try:
        for (name, steps), outputs in groups.items():
            _write(tensors[name], steps, outputs, out, advance)
        os.fsync(out)
    finally:
        os.close(out)


def _made_together(source: Source) -> tuple[str, tuple[Step, ...]]:
    return source.tensor, source.steps


def _write(
    entry: TensorEntry,
    steps: tuple[Step, ...],
    outputs: Mapping[int, Placement],
    out: int,
    advance: Callable[[int], None],
) -> None:
    """Stream one tensor through its steps, some rows along its first axis at a time."""
    rows = entry.shape[0] if entry.shape else 1
    row = entry.elements // max(rows, 1)
    turned = bool(steps) and steps[-1].turns
    at_once = max(1, CHUNK // max(row * 4, 1))
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        block = read_rows(entry, start, count)
        made: tuple[torch.Tensor, ...] = (block,)
        for step in steps:
            made = step.apply(made[0], start)
        _require_finite(made[0] if made[0].dtype in WIDE else block, entry)
        for index, place in outputs.items():
            values = made[index]
            if turned:
                _write_columns(values, start, rows, place.offset, out)
            else:
                _pwrite(out, values.flatten(), place.offset + start * (place.nbytes // rows))
            advance(values.numel() * values.element_size())


def _write_columns(block: torch.Tensor, start: int, columns: int, offset: int, out: int) -> None:
    """Columns `start …` of a row-major matrix with `columns` columns, or so many values of a vector of them."""
    if block.ndim == 1:
        _pwrite(out, block, offset + start * block.element_size())
        return
    if block.shape[1] == columns:
        _pwrite(out, block.flatten(), offset)
        return
    for index, row in enumerate(block):
        _pwrite(out, row, offset + (index * columns + start) * block.element_size())


def _require_finite(values: torch.Tensor, entry: TensorEntry) -> None:
    if not torch.isfinite(values).all():
        name = str(values.dtype).removeprefix("torch.")
        raise UsageError(
            f"{entry.file}: tensor '{entry.name}' holds values that are not finite in {name}: "
            "mend it, or choose another precision"
        )


def _pwrite(file: int, values: torch.Tensor, offset: int) -> None:
    bytes_of: Any = values.contiguous().view(torch.uint8).numpy()
    view = memoryview(bytes_of)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
