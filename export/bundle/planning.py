"""What is told of a bundle before it is built: nothing is read but headers, and nothing is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...runtime.bundle.graphs import GraphKey, GraphSpec
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.reporter import Reporter
from ...targets.facts import BuildTarget
from ..families import modules_of
from ..lowering.forms import make_forms
from .blueprint import Blueprint, draw
from .options import BuildOptions

__all__ = ["Plan", "plan_bundle"]


@dataclass(frozen=True)
class Plan:
    """What a target tells before it builds."""

    memory: Mapping[Resolution, Mapping[GraphKey, int]]
    """Bytes that a run of each graph would take, without weights; empty where the target cannot tell."""
    files: Mapping[str, int]
    """Bytes of each file that will hold weights, by its name, about; empty where the target cannot tell."""


def plan_bundle(
    checkpoint: Checkpoint, target: BuildTarget, options: BuildOptions, reporter: Reporter | None = None
) -> Plan:
    """Plan a bundle.

    Args:
        checkpoint: read and checked.
        target: to build for.
        options: see `build_bundle`.
        reporter: told about progress.

    Raises:
        UsageError: the target cannot tell anything before it is built, or cannot build it with these options.
    """
    memory_of, files_of = target.memory_plan(options.target), target.file_plan(options.target)
    if memory_of is None and files_of is None:
        raise UsageError(
            f"target '{target.name}' has no plan of memory before it is built: read `inspect BUNDLE` after that"
        )
    modules_of(checkpoint.model.family).check_components(checkpoint)
    blueprint = draw(checkpoint, target, options)
    memory, files = dict[str, int](), dict[str, int]()
    for specs, forms in _programs(blueprint, reporter or Reporter()):
        if memory_of is not None:
            memory |= {spec.name: memory_of(form) for spec, form in zip(specs, forms, strict=True)}
        if files_of is not None:
            files |= files_of(forms)
    sizes = blueprint.specs if memory_of is not None else {}
    return Plan({size: {key: memory[spec.name] for key, spec in sizes[size].items()} for size in sizes}, files)


def _programs(blueprint: Blueprint, reporter: Reporter) -> Iterator[tuple[list[GraphSpec], list[Any]]]:
    """Graphs and forms of each program; the weights files have their sizes, and nothing in them."""
    with TemporaryDirectory(prefix="pyrexport-") as folder:
        for name, places in blueprint.files.items():
            with (Path(folder) / name).open("wb") as file:
                file.truncate(places.nbytes)  # nothing is read of it, or written to the disk
        for program, graphs in blueprint.programs.items():
            reporter.begin(f"graph {program}", 1)
            name = blueprint.weights_of(program)
            places, weights = blueprint.files[name], Path(folder) / name
            forms = make_forms(blueprint.target.form, program, graphs, blueprint.dialect, places, weights)
            yield [graph.spec for graph in graphs], forms
            reporter.advance(1)
