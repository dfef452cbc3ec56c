"""Graphs of a checkpoint, to be lowered."""

from pathlib import Path
from typing import Any

from pyrexport.export.bundle.blueprint import Blueprint, draw
from pyrexport.export.bundle.options import BuildOptions
from pyrexport.export.lowering.graphs import GraphModule
from pyrexport.runtime.quantisation import COMPONENTS
from pyrexport.targets.facts import BuildTarget
from support.building import small_checkpoint


def blueprint(checkpoint: Path, target: BuildTarget, precision: str = "fp32", **target_options: Any) -> Blueprint:
    """A bundle that could be built; the target's engine need not be there."""
    opened = small_checkpoint(checkpoint)
    schemes = dict.fromkeys(COMPONENTS, precision)
    decoders = tuple(opened.model.decoders)
    options = BuildOptions((opened.resolution,), schemes, {}, (None,), "fp32", decoders, target_options)
    return draw(opened, target, options)


def graph_of(drawn: Blueprint, name: str) -> GraphModule:
    """One of its graphs."""
    return next(graph for group in drawn.programs.values() for graph in group if graph.spec.name == name)
