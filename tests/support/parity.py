"""Comparing bundles with traces, and traces that were tampered with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrexport
from pyrexport.runtime.model.safetensors import read_metadata
from pyrexport.runtime.proof.parity import check_parity
from pyrexport.runtime.proof.trace import Trace
from safetensors.numpy import load_file, save_file

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
