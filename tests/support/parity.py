"""Comparing bundles with traces, and traces that were tampered with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pyrexport
from pyrexport.runtime.model.safetensors import read_metadata
from pyrexport.runtime.proof.parity import check_parity
from pyrexport.runtime.proof.trace import Trace
from safetensors.numpy import load_file, save_file
from support.builders import resign

Change = Callable[[list[np.ndarray]], list[np.ndarray]]

OBLONG = ("--resolution", "17x64x128")
"""For `make_checkpoint`: height and width can be told apart."""


def parity(bundle: Path, trace: Path) -> dict[str, Any]:
    """What `check_parity` says."""
    with pyrexport.load(bundle, resident=True) as opened:
        return check_parity(opened, Trace(trace))


def tampered(
    path: Path,
    out: Path,
    describe: Callable[[Any], object] | None = None,
    change: Callable[[Any], object] | None = None,
) -> Path:
    """A trace with its description or its tensors changed."""
    document = json.loads(read_metadata(path)["trace"])
    tensors = load_file(path)
    if describe:
        describe(document)
    if change:
        change(tensors)
    save_file(tensors, out, metadata={"trace": json.dumps(document)})
    return out


def change_weight(folder: Path, names: list[str], change: Change, graph: str = "stage0") -> None:
    """Change float32 weights of a graph in the weights file."""
    initializers = ir.load(folder / f"{graph}.onnx").graph.initializers
    mapped = []
    for name in names:
        place = initializers[name].const_value
        mapped.append(np.memmap(folder / "weights.bin", np.float32, "r+", place.offset, tuple(place.shape.numpy())))
    values = change([np.array(m) for m in mapped])
    for target, value in zip(mapped, values, strict=True):
        target[...] = value
        target.flush()
    resign(folder)
