"""Where a stage goes wrong: the first block whose output leaves the reference's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ...runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from ...runtime.chain.plan import StepPlan, single_step
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.pipeline import Pipeline
from ...runtime.proof.metrics import distance
from ...runtime.proof.tolerances import tolerances_of
from ...runtime.proof.trace import Trace
from ..families import modules_of

__all__ = ["first_divergence"]

Arrays = dict[str, NDArray[Any]]


def first_divergence(pipeline: Pipeline, checkpoint: Checkpoint, trace: Trace, stage: int) -> dict[str, Any]:
    """Evaluate one probe of a stage on both sides, block by block.

    Returns:
        `{"stage", "first", "relative_l2": {place: error}}`; `first` is None if no place diverges.

    Raises:
        UsageError: the bundle is not one of ONNX graphs.
    """
    manifest = pipeline.bundle.manifest
    index = next(k for k, probe in enumerate(trace.probes) if probe.stage == stage)
    step = single_step(pipeline.model.pyramid, manifest.stages[stage], trace.probes[index].level)
    latent, text = trace.tensor(f"probe.{index}.latent"), trace.tensor("text.0")
    found = _bundle_outputs(pipeline, step, latent, text)
    expected = _reference_outputs(checkpoint, step, latent, text)
    errors = {place: distance(found[place], value).relative_l2 for place, value in expected.items()}
    tolerance = tolerances_of(manifest)["stages"]
    first = next((place for place, error in errors.items() if not error <= tolerance), None)
    return {"stage": stage, "first": first, "relative_l2": errors}


def _reference_outputs(
    checkpoint: Checkpoint, step: StepPlan, latent: NDArray[np.float32], text: NDArray[np.float32]
) -> Arrays:
    modules = modules_of(checkpoint.model.family)
    stage = modules.load_transformer(checkpoint)[step.stage.index]
    outputs: Arrays = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        outputs["patch embedding"] = inputs[0].numpy().copy()

    blocks = modules.blocks(stage)
    handles = [blocks[0].register_forward_pre_hook(before)]
    for index, block in enumerate(blocks):

        def after(module: nn.Module, inputs: Any, output: torch.Tensor, name: str = f"block {index}") -> None:
            outputs[name] = output.numpy().copy()

        handles.append(block.register_forward_hook(after))
    with torch.no_grad():
        timestep = torch.tensor([step.timestep], dtype=torch.float32)
        velocity = stage(torch.from_numpy(latent)[None], timestep, torch.from_numpy(text)[None])
    for handle in handles:
        handle.remove()
    return outputs | {"output": velocity.numpy()}


def _bundle_outputs(
    pipeline: Pipeline, step: StepPlan, latent: NDArray[np.float32], text: NDArray[np.float32]
) -> Arrays:
    """The stage's graph with its inner values as outputs, evaluated by the bundle's own target."""
    entry = pipeline.bundle.manifest.graphs[stage_key(step.stage.index, step.expert)]
    file = pipeline.bundle.file(entry.file)
    if file.suffix != ".onnx":
        raise UsageError("only a bundle of ONNX graphs can be bisected: its stage is evaluated block by block")
    model = ir.load(file)
    places = dict(_block_outputs(model))
    inner = {name: value for name, value in places.items() if value not in model.graph.outputs}
    model.graph.outputs.extend(inner.values())
    specs = tuple(_spec(value) for value in inner.values())
    spec = GraphSpec(entry.spec.key, entry.spec.inputs, (*entry.spec.outputs, *specs))
    data = ir.to_proto(model).SerializeToString()
    engine = pipeline.target.open_model(data, pipeline.bundle.folder, spec, pipeline.graphs.options)
    try:
        values = engine.run(pipeline.stage_inputs(step, latent, {"text": text}))
    finally:
        engine.close()
    return {name: values[str(value.name)] for name, value in places.items()} | {"output": values["velocity"]}


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    return TensorSpec(str(value.name), tuple(int(n) for n in value.shape.numpy()), str(value.dtype.numpy()))


def _block_outputs(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """The residual stream: the patch embedding, and the sum that ends each block, found by the names of its weights."""
    biases = model.graph.initializers
    first_norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    stream = first_norm.inputs[0]
    assert stream is not None
    yield "patch embedding", stream
    index = 0
    while f"blocks.{index}.ffn_out.bias" in biases:
        biased = next(iter(biases[f"blocks.{index}.ffn_out.bias"].uses()))
        (gated,) = biased.node.outputs[0].uses()
        (added,) = gated.node.outputs[0].uses()
        output = added.node.outputs[0]
        joined = next((use.node for use in output.uses() if use.node.op_type == "Concat"), None)
        yield f"block {index}", joined.outputs[0] if joined else output
        index += 1
