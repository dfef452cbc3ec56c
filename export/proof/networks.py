"""The networks of an engine bundle, made again and evaluated on ONNX Runtime where no GPU is."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.bundle.engines import Engine, EngineOptions, find_target
from ...runtime.bundle.manifest import PRECISIONS, is_capability
from ...runtime.bundle.opening import Bundle
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.pipeline import Pipeline
from ...runtime.reporter import Reporter
from ...targets.digest import network_digest
from ...targets.external import refer
from ...targets.forms import NetworkForm, TensorSpec
from ...targets.ort.session import OrtEngine
from ..bundle.parts import Options
from ..bundle.work import Work

__all__ = ["graph_pipeline", "widen"]

SHORT = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


class _Graphs:
    """A target whose graphs are ONNX files of a folder, whatever the bundle's own engine."""

    GROUPING = "none"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_engine(self, file: Path, graph: str, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
        return OrtEngine(self.folder / f"{graph}.onnx", specs, options)


def graph_pipeline(
    bundle: Bundle, checkpoint: Checkpoint, folder: Path, options: EngineOptions, reporter: Reporter | None = None
) -> Pipeline:
    """A bundle whose graphs are evaluated from its networks, in place of its engines.

    Weights are rounded as the engine stores them; all arithmetic is float32.

    Args:
        bundle: of a target that takes networks.
        checkpoint: that it was built from.
        folder: an empty one that the networks and their weights are written to.
        options: of ONNX Runtime.
        reporter: told about progress.

    Raises:
        UsageError: the bundle has no networks, or its options are not ours.
        CheckFailed: a network is not the one that the bundle was built from.
    """
    manifest = bundle.manifest
    target = find_target(manifest.target)
    if target.FORM != "network":
        raise UsageError(f"{bundle.folder} was built for {manifest.engine}, which runs here: leave out --graph")
    work = Work(checkpoint, manifest.target, target, folder, _options(bundle), reporter or Reporter(), run_graphs=False)
    for form in work.networks():
        found = network_digest(form)
        for graph in form.profiles:
            entry = manifest.graphs.get(graph)
            if entry is None or entry.facts.get("network") != found:
                raise CheckFailed(
                    f"the network of {graph}, made again, is not the one that {bundle.folder} was built from: expected SHA-256 "
                    f"{str(entry and entry.facts.get('network'))[:16]}…, found {found[:16]}…: another checkpoint, or another "
                    "version of pyrexport or torch"
                )
        widen(form.model)
        for graph, inputs in form.profiles.items():
            _save(form, graph, inputs, folder)
    return Pipeline(bundle, _Graphs(folder), options=options, resident=True)  # type: ignore[arg-type]


def _options(bundle: Bundle) -> Options:
    known = {field.name for field in fields(Options)}
    given = bundle.manifest.provenance.get("options")
    if not isinstance(given, dict) or given.keys() != known or not _are_ours(given):
        raise UsageError(f"{bundle.folder} was built with other options than this version knows: build it again")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return Options(**values)


def _are_ours(given: Mapping[str, Any]) -> bool:
    tile, capabilities = given["vae_tile"], given["compute_capabilities"]
    return (
        given["precision"] in list(PRECISIONS)
        and given["text_precision"] in list(PRECISIONS)
        and given["vae_caches"] == "float32"
        and given["layout"] in ("", "shared", "per-stage")
        and (
            tile is None or (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n > 0 for n in tile))
        )
        and isinstance(capabilities, list)
        and all(map(is_capability, capabilities))
    )


def widen(model: ir.Model) -> None:
    """Turn a network of 16 bits into one of float32 that keeps the rounding of its weights.

    Activations are no longer rounded; attention becomes ONNX Runtime's own operator, which never holds the scores.
    """
    graph = model.graph
    outputs, inputs = set(graph.outputs), set(graph.inputs)
    rounded: list[ir.Value] = [value for value in graph.initializers.values() if value.dtype in SHORT]
    for node in graph:
        (first, *_), result = (*node.inputs, None), node.outputs[0]
        if node.op_type == "Cast" and result.dtype in SHORT and result not in outputs:
            if first is not None and first.is_initializer():
                rounded.append(result)
            else:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        if node.op_type == "Attention":
            heads = node.attributes["q_num_heads"].as_int()
            node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
            node.attributes.clear()
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
            model.opset_imports["com.microsoft"] = 1
    for node in graph:
        for value in node.outputs:
            if value.dtype in SHORT and value not in outputs and value not in inputs and value not in rounded:
                value.dtype = ir.DataType.FLOAT
    for value in rounded:
        _cast_back(graph, value)


def _cast_back(graph: ir.Graph, value: ir.Value) -> None:
    """Let all users of a 16-bit value read it as float32."""
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{value.name}_wide"
    cast.outputs[0].dtype = ir.DataType.FLOAT
    users = {use.node for use in uses}
    graph.insert_before(next(node for node in graph if node in users), cast)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _save(form: NetworkForm, graph: str, inputs: tuple[TensorSpec, ...], folder: Path) -> None:
    """Write the network with the fixed shapes of one graph."""
    for node in form.model.graph:
        for value in node.outputs:
            value.shape = None
    shapes = {spec.name: spec.shape for spec in (*inputs, *form.outputs[graph])}
    for value in (*form.model.graph.inputs, *form.model.graph.outputs):
        value.shape = ir.Shape(shapes[str(value.name)])
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, folder / f"{graph}.onnx")
