"""The networks of an engine bundle, made again and evaluated where the engines' device is not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Target, find_target
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.bundle.opening import Bundle
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.pipeline import Pipeline
from ...runtime.reporter import Reporter
from ...targets.digest import network_digest
from ...targets.external import refer
from ...targets.facts import BuildTarget, find_build_target
from ...targets.forms import OnnxForm
from ..bundle.blueprint import Blueprint, draw
from ..bundle.journal import Journal
from ..bundle.options import options_of
from ..bundle.work import make_room, write_weights
from ..lowering.forms import make_forms

__all__ = ["graph_pipeline"]


class _Networks(Target):
    """Graphs that are ONNX files of a folder, evaluated by another target than the bundle's own."""

    def __init__(self, folder: Path, evaluator: Target) -> None:
        self.name, self.folder, self.evaluator = f"networks on {evaluator.name}", folder, evaluator

    def check_version(self, name: str, version: str) -> None:
        """Accept any version: the networks were made just now."""

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """The network of a graph."""
        return self.evaluator.open_engine(self.folder / f"{spec.name}.onnx", spec, facts, options)


def graph_pipeline(
    bundle: Bundle,
    checkpoint: Checkpoint,
    folder: Path,
    options: EngineOptions,
    recipe: Path | None = None,
    reporter: Reporter | None = None,
) -> Pipeline:
    """A bundle whose graphs are evaluated from its networks, in place of its engines.

    Args:
        bundle: a bundle of a target that has an evaluator.
        checkpoint: the checkpoint that it was built from.
        folder: an empty folder that the networks and their weights are written to.
        options: how the evaluator opens graphs.
        recipe: the recipe that it was built by, where it has one.
        reporter: told about progress.

    Raises:
        UsageError: the bundle's own graphs run here, its options are none that this version knows, or the recipe is
            missing or not its own.
        CheckFailed: a network is not the one that the bundle was built from.
    """
    manifest = bundle.manifest
    target = find_build_target(manifest.target)
    if not target.evaluator:
        raise UsageError(f"{bundle.folder} was built for {manifest.engine}, which runs here: leave out --graph")
    evaluator = find_target(target.evaluator)
    given = options_of(manifest, target, checkpoint, recipe)
    try:
        resolved = replace(given, target=target.check_options(given.target))
    except UsageError as error:
        raise UsageError(
            f"{bundle.folder} was built with other options than this version knows: build it again ({error})"
        ) from error
    blueprint, reporter = draw(checkpoint, target, resolved), reporter or Reporter()
    make_room(folder, blueprint, lowers=True)
    write_weights(folder, blueprint, Journal(folder, blueprint), reporter, lowers=True)
    for program in blueprint.programs:
        reporter.begin(f"graph {program}", 1)
        _write_networks(bundle, target, blueprint, program, folder)
        reporter.advance(1)
    return Pipeline(bundle, _Networks(folder, evaluator), options=options, resident=True)


def _write_networks(bundle: Bundle, target: BuildTarget, blueprint: Blueprint, program: str, folder: Path) -> None:
    """Make a program's networks again, check that they are the bundle's, and write them for each of its graphs."""
    name, graphs = blueprint.weights_of(program), blueprint.programs[program]
    for form in make_forms(target.form, program, graphs, blueprint.dialect, blueprint.files[name], folder / name):
        _write_network(bundle, target, form, folder)


def _write_network(bundle: Bundle, target: BuildTarget, form: OnnxForm, folder: Path) -> None:
    found = network_digest(form)
    for spec in form.graphs:
        expected = target.network_digest(bundle.manifest.entries[spec.name].facts)
        if expected != found:
            raise CheckFailed(
                f"the network of {spec.name}, made again, is not the one that {bundle.folder} was built from: "
                f"expected SHA-256 {expected[:16]}…, found {found[:16]}…: "
                "another checkpoint, or another version of pyrexport or torch"
            )
    target.evaluable(form)
    for spec in form.graphs:
        _save(form, spec, folder)


def _save(form: OnnxForm, spec: GraphSpec, folder: Path) -> None:
    """Write the network with the fixed shapes of one graph."""
    for node in form.model.graph:
        for value in node.outputs:
            value.shape = None
    shapes = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
    values: Sequence[ir.Value] = (*form.model.graph.inputs, *form.model.graph.outputs)
    for value in values:
        value.shape = ir.Shape(shapes[str(value.name)])
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, folder / f"{spec.name}.onnx")
