"""What lowering takes: a graph's specification, and the module that computes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...runtime.bundle.graphs import GraphSpec

__all__ = ["GraphModule"]


@dataclass(frozen=True)
class GraphModule:
    """A graph to be made."""

    spec: GraphSpec
    module: nn.Module
    """What computes it; its parameters have sources. Graphs that differ in their shapes alone may share it."""
    symbols: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    """`torch.export.Dim` of the axes in which graphs of the same module differ, by input."""
    layers: Sequence[nn.Module] = ()
    """Layers of the module that are of one class with the same settings, and whose first input and only output are
    shaped alike: they are exported once where their parameters are alike too."""
