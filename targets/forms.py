"""What a target's build is given: graphs without weights, and where in which file each weight lies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.bundle.engines import Facts
from ..runtime.bundle.graphs import GraphSpec

__all__ = ["Lowering", "OnnxForm", "Placement", "TorchForm", "TorchLayer"]


@dataclass(frozen=True)
class Placement:
    """A tensor's place in the weights file."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OnnxForm:
    """An ONNX graph, or a network of symbolic shapes that is several graphs at once."""

    name: str
    model: Any
    """`onnx_ir.Model`; the initializers named in `placements` have no values."""
    placements: Mapping[str, Placement]
    weights: Path
    """The file that they are in: the bundle's own, or one that is gone when the bundle is done."""
    graphs: tuple[GraphSpec, ...]


@dataclass(frozen=True)
class TorchLayer:
    """One of the layers of a program that are alike: `pyrexport::layer` stands for each of them there."""

    program: Any
    """`torch.export.ExportedProgram` of the first of them, its weights mapped from the file."""
    placements: Mapping[str, Placement]
    parameters: tuple[str, ...]
    """Names of its weights, in the order in which a call hands them over."""


@dataclass(frozen=True)
class TorchForm:
    """A `torch.export` program whose weights are mapped from a file."""

    name: str
    program: Any
    """`torch.export.ExportedProgram`; the entries of its state that `placements` names are read when they are used."""
    placements: Mapping[str, Placement]
    weights: Path
    """The file that they are in: the bundle's own, or one that is gone when the bundle is done."""
    graphs: tuple[GraphSpec, ...]
    """The one graph that it is."""
    layers: tuple[TorchLayer, ...] = ()
    """By kind: what calls of `pyrexport::layer` in the program stand for."""


@dataclass(frozen=True)
class Lowering:
    """What a target found out about a graph when it wrote it."""

    line: str = ""
    """What people are told; empty: there is nothing to say."""
    facts: Facts = field(default_factory=dict)
    """Facts for the manifest, as JSON: a session is given them."""
    memory: int | None = None
    """What a run will take, in bytes, without weights; None where that is not known."""
    files: tuple[str, ...] = ()
    """Files that it became beside those that `BuildTarget.files` names: what only the graph itself tells."""
