"""What a target's `build` is given: a graph without weights, and where in the weights file each one lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NetworkForm", "OnnxForm", "Placement", "TensorSpec", "TorchForm"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a graph's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Placement:
    """A tensor's place in the weights file."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OnnxForm:
    """An ONNX graph whose weights lie in another file."""

    name: str
    model: Any
    """`onnx_ir.Model`; the initializers named in `placements` have no values."""
    placements: Mapping[str, Placement]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory: int
    """What a run of it takes in ONNX Runtime, in bytes, without weights."""


@dataclass(frozen=True)
class TorchForm:
    """A `torch.export` program whose weights are mapped from a file."""

    name: str
    program: Any
    """`torch.export.ExportedProgram`; the entries of its state that are named in `placements` are read when they are used."""
    placements: Mapping[str, Placement]
    weights: Path
    """The file. It is gone when the bundle is done: a target stores what it needs."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory: None = None
    """Not known before it is lowered."""


@dataclass(frozen=True)
class NetworkForm:
    """An ONNX network of the ONNX standard's operators alone, with symbolic shapes, that is several graphs at once."""

    name: str
    model: Any
    """`onnx_ir.Model`; the initializers named in `placements` have no values."""
    placements: Mapping[str, Placement]
    weights: Path
    """The file that they are in. It is gone when the bundle is done: a target stores what it needs."""
    profiles: Mapping[str, tuple[TensorSpec, ...]]
    """Inputs of each graph."""
    outputs: Mapping[str, tuple[TensorSpec, ...]]
    """Likewise."""
    compute_capabilities: tuple[str, ...]
    """Of the GPUs that it is built for, such as "8.9"."""
