"""Where a stage goes wrong: the first block whose output leaves the reference's, and the first layer in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ...runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from ...runtime.chain.plan import StepPlan, single_step
from ...runtime.chain.sampler import Conditions
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.pipeline import Pipeline
from ...runtime.proof.metrics import distance
from ...runtime.proof.parity import probe_conditions
from ...runtime.proof.tolerances import tolerances_of
from ...runtime.proof.trace import Trace
from ..families import FamilyModules, modules_of
from .layers import constant, layer_nodes, stage_model

__all__ = ["first_divergence"]

EMBEDDING, OUTPUT = "patch embedding", "output"
"""Places before the first block and after the last one."""

Arrays = dict[str, NDArray[Any]]
Values = Mapping[str, Sequence[ir.Value]]
"""Values of a graph by what they are; those of one are pieces along the tokens."""


def first_divergence(
    pipeline: Pipeline, checkpoint: Checkpoint, trace: Trace, stage: int, layer: str | None = None
) -> dict[str, Any]:
    """Evaluate one probe of a stage on both sides, block by block, and the first block that diverges layer by layer.

    Args:
        pipeline: a bundle.
        checkpoint: the checkpoint that it was built from.
        trace: a trace of it.
        stage: the stage.
        layer: the layer that is known to be wrong, by the checkpoint's name of it; None: it is looked for, in all
            blocks where no block's output diverges, one block at a time.

    Returns:
        `{"stage", "first", "layer", "relative_l2": {place: error}, "layers": {layer: error}}`; `first` and `layer` are
        None if nothing diverges.

    Raises:
        UsageError: the bundle is not one of ONNX graphs.
    """
    probe = _Probe.of(pipeline, checkpoint, trace, stage)
    tolerances = tolerances_of(pipeline.bundle.manifest)
    largest = tolerances.get("layers", tolerances["stages"])
    places = probe.compare_blocks()
    first = next((place for place, error in places.items() if not error <= tolerances["stages"]), None)
    layers: dict[str, float] = {}
    for index, names in enumerate(probe.layers):
        if layer is None and first in (f"block {index}", OUTPUT, None):
            layers |= probe.compare_layers(names)
            layer = next((name for name, error in layers.items() if not error <= largest), None)
    return {"stage": stage, "first": first, "layer": layer, "relative_l2": places, "layers": layers}


@dataclass(frozen=True)
class _Probe:
    """One evaluation of a stage, on both sides."""

    pipeline: Pipeline
    family: FamilyModules
    layers: Sequence[Mapping[str, str]]
    """See `FamilyModules.block_layers`."""
    reference: nn.Module
    step: StepPlan
    latent: NDArray[np.float32]
    conditions: Conditions

    @classmethod
    def of(cls, pipeline: Pipeline, checkpoint: Checkpoint, trace: Trace, stage: int) -> "_Probe":
        """The first probe of a stage in a trace."""
        family, model = modules_of(checkpoint.model.family), checkpoint.model
        index = next(k for k, probe in enumerate(trace.probes) if probe.stage == stage)
        stages = pipeline.bundle.manifest.stages
        step = single_step(pipeline.model.pyramid, stages[stage], trace.probes[index].level)
        reference = family.load_transformer(checkpoint, step.expert)[stage]
        latent, conditions = trace.tensor(f"probe.{index}.latent"), probe_conditions(model, trace)
        return cls(pipeline, family, family.block_layers(model), reference, step, latent, conditions)

    def compare_blocks(self) -> dict[str, float]:
        """Errors of the residual stream, and of the stage's output."""
        model = self.model()
        blocks = enumerate(self.family.blocks(self.reference))
        expected = self.run_reference({**{f"block {index}": block for index, block in blocks}, OUTPUT: self.reference})
        found = self.run_bundle(model, {name: [value] for name, value in self.stream(model)})
        return {place: distance(found[place], value).relative_l2 for place, value in expected.items()}

    def compare_layers(self, names: Mapping[str, str]) -> dict[str, float]:
        """Errors of the outputs of layers: names in the checkpoint, and in the graph.

        A layer whose weights and bias are stored divided by a vector, as the layer after it undoes, is compared with
        the reference's output divided likewise.
        """
        model = self.model()
        nodes = {name: layer_nodes(model, own) for name, own in names.items()}
        nodes = {name: found for name, found in nodes.items() if found}
        modules = {name: self.family.layer(self.reference, name) for name in nodes}
        expected = self.run_reference(modules)
        found = self.run_bundle(model, {name: [node.outputs[0] for node in parts] for name, parts in nodes.items()})
        ratios = {name: _ratio(model, names[name], module) for name, module in modules.items()}
        return {name: distance(found[name], expected[name] * ratios[name]).relative_l2 for name in nodes}

    def model(self) -> ir.Model:
        """The stage's graph."""
        return stage_model(self.pipeline.bundle, stage_key(self.step.stage.index, self.step.expert))

    def stream(self, model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
        """The residual stream: the patch embedding, and the sum that ends each block, found by its last layer."""
        first_norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
        embedded = first_norm.inputs[0]
        assert embedded is not None
        yield EMBEDDING, embedded
        for index, names in enumerate(self.layers):
            last = layer_nodes(model, [*names.values()][-1])[0]
            (gated,) = last.outputs[0].uses()
            (added,) = gated.node.outputs[0].uses()
            output = added.node.outputs[0]
            joined = next((use.node for use in output.uses() if use.node.op_type == "Concat"), None)
            yield f"block {index}", joined.outputs[0] if joined else output
        yield OUTPUT, model.graph.outputs[0]

    def run_reference(self, watched: Mapping[str, nn.Module]) -> Arrays:
        """Outputs of modules, and what the first block is given."""
        outputs: Arrays = {}

        def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            outputs[EMBEDDING] = inputs[0].numpy().copy()

        def after(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            outputs[name] = output.numpy().copy()

        handles = [self.family.blocks(self.reference)[0].register_forward_pre_hook(before)]
        handles += [module.register_forward_hook(partial(after, name)) for name, module in watched.items()]
        with torch.no_grad():
            timestep = torch.tensor([self.step.timestep], dtype=torch.float32)
            given = {name: torch.from_numpy(values)[None] for name, values in self.conditions.items()}
            self.reference(torch.from_numpy(self.latent)[None], timestep, **given)
        for handle in handles:
            handle.remove()
        return outputs

    def run_bundle(self, model: ir.Model, places: Values) -> Arrays:
        """Inner values of the stage's graph, which become outputs, evaluated by the bundle's own target."""
        entry = self.pipeline.bundle.manifest.graphs[stage_key(self.step.stage.index, self.step.expert)]
        given = {str(value.name): value for pieces in places.values() for value in pieces}
        inner = [value for value in given.values() if value not in model.graph.outputs]
        model.graph.outputs.extend(inner)
        spec = GraphSpec(entry.spec.key, entry.spec.inputs, (*entry.spec.outputs, *map(_spec, inner)))
        data = ir.to_proto(model).SerializeToString()
        pipeline = self.pipeline
        engine = pipeline.target.open_model(data, pipeline.bundle.folder, spec, entry.facts, pipeline.graphs.options)
        try:
            values = engine.run(pipeline.stage_inputs(self.step, self.latent, self.conditions))
        finally:
            engine.close()
        return {
            name: np.concatenate([values[str(value.name)] for value in pieces], axis=1)
            for name, pieces in places.items()
        }


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    return TensorSpec(str(value.name), tuple(int(n) for n in value.shape.numpy()), str(value.dtype.numpy()))


def _ratio(model: ir.Model, layer: str, module: nn.Module) -> NDArray[Any]:
    """What each channel of a layer is stored multiplied by [out]: its bias tells, where it is not zero."""
    stored, own = constant(model.graph.initializers[f"{layer}.bias"]), module.get_parameter("bias").numpy()
    return np.divide(stored, own, out=np.ones_like(own), where=own != 0)
