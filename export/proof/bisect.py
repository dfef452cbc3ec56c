"""Where a stage goes wrong: the first block whose output leaves the reference's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.pipeline import Pipeline
from ...runtime.proof.parity import TOLERANCES, distance
from ...runtime.proof.trace import Trace
from ..families.wan.modules import StageTransformer, load_transformer

__all__ = ["first_divergence"]


def first_divergence(pipeline: Pipeline, checkpoint: Checkpoint, trace: Trace, stage: int) -> dict[str, Any]:
    """Evaluate one probe of a stage on both sides, block by block.

    Returns:
        `{"stage", "first", "relative_l2": {place: error}}`; `first` is None if no place diverges.

    Raises:
        UsageError: the bundle is not one of ONNX graphs.
    """
    if pipeline.bundle.manifest.target != "ort":
        raise UsageError("only a bundle of the target ort can be bisected: its graph is evaluated block by block")
    index = next(k for k, probe in enumerate(trace.probes) if probe.stage == stage)
    latent, level = trace.tensor(f"probe.{index}.latent"), trace.probes[index].level
    text = trace.tensor("text.0")
    expected = _reference_outputs(load_transformer(checkpoint)[stage], latent, 1000 * level, text)
    found = _bundle_outputs(pipeline, stage, latent, 1000 * level, text)
    errors = {place: distance(found[place], value).relative_l2 for place, value in expected.items()}
    tolerance = TOLERANCES[pipeline.bundle.manifest.storage]["stages"]
    first = next((place for place, error in errors.items() if not error <= tolerance), None)
    return {"stage": stage, "first": first, "relative_l2": errors}


def _reference_outputs(
    stage: StageTransformer, latent: NDArray[np.float32], timestep: float, text: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = {}
    blocks = stage.transformer.blocks

    def before(module: Any, inputs: tuple[Any, ...]) -> None:
        outputs["patch embedding"] = inputs[0].numpy().copy()

    handles = [blocks[0].register_forward_pre_hook(before)]
    for index, block in enumerate(blocks):

        def after(module: Any, inputs: Any, output: torch.Tensor, name: str = f"block {index}") -> None:
            outputs[name] = output.numpy().copy()

        handles.append(block.register_forward_hook(after))
    with torch.no_grad():
        velocity = stage(torch.from_numpy(latent)[None], torch.tensor([timestep]), torch.from_numpy(text)[None])
    for handle in handles:
        handle.remove()
    return outputs | {"output": velocity.numpy()}


def _bundle_outputs(
    pipeline: Pipeline, stage: int, latent: NDArray[np.float32], timestep: float, text: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    import onnxruntime as ort

    from ...runtime.pipeline.features import timestep_features

    manifest = pipeline.bundle.manifest
    model = ir.load(pipeline.bundle.file(manifest.graphs[f"stage{stage}"].file))
    places = dict(_block_outputs(model))
    for value in places.values():
        if value not in model.graph.outputs:
            model.graph.outputs.append(value)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(pipeline.bundle.folder.resolve())
    )
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    inputs = {
        "latent": latent[None],
        "timestep_features": timestep_features(timestep, manifest.timestep_frequencies),
        "text": text[None],
    }
    values = session.run([*(value.name for value in places.values()), "velocity"], inputs)
    return dict(zip([*places, "output"], values, strict=True))


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
