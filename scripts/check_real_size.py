"""Parts of a large bundle beside PyTorch, where both do not fit in memory together, and what each takes.

    python scripts/check_real_size.py BUNDLE CHECKPOINT --part stage2 --part text --part vae [--threads 2]

Each side runs in a process of its own, on inputs of the same seed: the reference first (diffusers' transformer,
transformers' encoder block by block, diffusers' VAE over three latent frames of a tile), then the bundle through the
runtime. Prints relative L2, seconds of a call, and peak anonymous memory beside the bundle's own plan.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from pyrexport.runtime.bundle.graphs import STAGE, GraphKey, decoder_key, stage_key, text_key
from pyrexport.runtime.chain.history import HISTORY
from pyrexport.runtime.chain.plan import StepPlan, single_step
from pyrexport.runtime.model.safetensors import TensorEntry
from pyrexport.runtime.pipeline.pipeline import Pipeline, load
from pyrexport.runtime.proof.memory import MemoryWatch, predicted_peaks
from pyrexport.runtime.proof.metrics import distance
from rich.console import Console
from rich.table import Table

PROMPT = "a red circle moving left"
PLACES = (0.7, 0.05)
"""Where between a stage's ends it is evaluated: the first at which the part's own network evaluates."""
LATENT_FRAMES = 3

Arrays = dict[str, NDArray[Any]]


def noise(*shape: int) -> NDArray[np.float32]:
    """The same values on both sides."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def step_of(pipeline: Pipeline, part: str) -> StepPlan:
    """One evaluation of the stage that a part is."""
    manifest = pipeline.bundle.manifest
    key = next(key for key in manifest.graphs if key.name == part)
    stage = manifest.stages[key.stage]
    levels = (stage.noisy + place * (stage.clean - stage.noisy) for place in PLACES)
    steps = (single_step(pipeline.model.pyramid, stage, level) for level in levels)
    return next(step for step in steps if step.expert == key.expert)


def conditions_of(inputs: Arrays) -> Arrays:
    """A stage's inputs but for its latent."""
    return {name: values for name, values in inputs.items() if name != "latent"}


def inputs_of(pipeline: Pipeline, part: str) -> Arrays:
    """What a part is given: read from the bundle, which the reference opens for this alone."""
    manifest, model = pipeline.bundle.manifest, pipeline.model
    if part == "text":
        embeddings, mask = pipeline.encoder.embed(PROMPT)
        return {"embeddings": embeddings, "mask": mask}
    if part == "vae":
        assert manifest.decoder is not None
        return {"latent": noise(model.pyramid.geometry.channels, LATENT_FRAMES, *manifest.decoder.tiles.tile)}
    stage, history = step_of(pipeline, part).stage, model.family.history
    inputs = {"latent": noise(*stage.latent), "text": noise(model.text_length, model.transformer.text_dim)}
    if history is not None:
        channels, _, height, width = stage.whole
        inputs[HISTORY] = noise(channels, history.frames, height, width)
    return inputs


def reference(part: str, bundle: str, checkpoint: str) -> Arrays:
    """The part in PyTorch, by output's name."""
    import torch
    from pyrexport.export.reference.reference import Reference
    from pyrexport.runtime.model.checkpoint import read_checkpoint

    with load(bundle) as pipeline:
        inputs = inputs_of(pipeline, part)
        step = None if part in ("text", "vae") else step_of(pipeline, part)
        resolution = pipeline.bundle.manifest.resolution
    opened = read_checkpoint(Path(checkpoint), resolution=resolution)
    if step is not None:
        return {"velocity": Reference(opened).velocity(step, inputs["latent"], conditions_of(inputs))}
    if part == "vae":
        return {"frames": Reference(opened).decode_float(inputs["latent"])}
    with torch.no_grad():
        return _reference_text(opened, **{name: torch.from_numpy(value) for name, value in inputs.items()})


def _reference_text(checkpoint: Any, embeddings: Any, mask: Any) -> Arrays:
    """Transformers' encoder, one block in memory at a time."""
    import torch
    from safetensors import safe_open
    from transformers import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5Block, UMT5LayerNorm

    config = UMT5Config.from_dict(dict(checkpoint.text_encoder_config))
    tensors: dict[str, TensorEntry] = checkpoint.text_encoder

    def filled(module: Any, prefix: str) -> Any:
        state = {}
        for name in module.state_dict():
            entry = tensors[prefix + name]
            with safe_open(entry.file, framework="pt") as file:
                state[name] = file.get_tensor(entry.name).float()
        module.load_state_dict(state, assign=True)
        return module.eval()

    x, out = embeddings, {}
    hidden = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
    for index in range(config.num_layers):
        with torch.device("meta"):
            block = UMT5Block(config, layer_idx=index)
        x = filled(block, f"encoder.block.{index}.")(x, attention_mask=hidden)[0]
        out[f"block {index}"] = x.numpy().copy()
    with torch.device("meta"):
        norm = UMT5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
    out["text"] = (filled(norm, "encoder.final_layer_norm.")(x) * mask[..., None]).numpy()
    return out


def candidate(part: str, bundle: str, threads: int) -> tuple[Arrays, dict[str, float]]:
    """The part by the runtime: outputs by name, and seconds, load and peak memory."""
    with MemoryWatch() as memory, load(bundle, threads=threads) as pipeline:
        inputs = inputs_of(pipeline, part)
        start = time.perf_counter()
        key, outputs = _evaluate(pipeline, part, inputs)
        load_seconds = pipeline.timings.load
        seconds = time.perf_counter() - start - load_seconds
        entry = pipeline.bundle.manifest.graphs[key]
        planned = predicted_peaks({key: entry.memory}, None, 0, pipeline.target.process_bytes).get(key.name, 0)
    figures = {"seconds": seconds, "load": load_seconds, "anonymous": memory.anonymous, "planned": planned}
    if part == "text":
        outputs |= _text_blocks(Path(bundle) / entry.file, inputs, threads)
    return outputs, figures


def _evaluate(pipeline: Pipeline, part: str, inputs: Arrays) -> tuple[GraphKey, Arrays]:
    """The graph that a part needs most memory for, and the part's outputs by name."""
    if part == "text":
        key = text_key(inputs["mask"].shape[1])
        return key, pipeline.run(key, inputs)
    if part == "vae":
        decoder = pipeline.bundle.manifest.decoder
        assert decoder is not None
        frames = pipeline.decode_tile(inputs["latent"], decoder)
        return decoder_key("vae", first=False), {"frames": np.concatenate(list(frames))}
    step = step_of(pipeline, part)
    velocity = pipeline.velocity(step, inputs["latent"], conditions_of(inputs))
    return stage_key(step.stage.index, step.expert), {"velocity": velocity}


def _text_blocks(file: Path, inputs: Arrays, threads: int) -> Arrays:
    """The output of every block: the sum that follows its last product, made an output of the graph."""
    import onnx_ir as ir
    import onnxruntime as ort

    model = ir.load(file)
    names = {}
    for name, weight in model.graph.initializers.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        if rest in ("wo.weight", "wo.values"):
            node = next(iter(weight.uses())).node
            while node.op_type != "Add":
                node = next(iter(node.outputs[0].uses())).node
            names[f"block {block}"] = node.outputs[0]
    model.graph.outputs.extend(value for value in names.values() if value not in model.graph.outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in (
        ("session.model_external_initializers_file_folder_path", str(file.parent.resolve())),
        ("session.disable_prepacking", "1"),
        ("optimization.disable_specified_optimizers", "ConstantFolding"),
    ):
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return dict(zip(names, session.run([value.name for value in names.values()], inputs), strict=True))


def child(side: str, part: str, bundle: str, checkpoint: str, threads: str, file: str) -> None:
    """One side of one part, into a file; the figures of the bundle's to standard output."""
    if side == "reference":
        import torch

        torch.set_num_threads(int(threads))
        np.savez(file, **reference(part, bundle, checkpoint))  # type: ignore[arg-type]
        return
    outputs, figures = candidate(part, bundle, int(threads))
    np.savez(file, **outputs)  # type: ignore[arg-type]
    print(json.dumps(figures))


@click.command()
@click.argument("bundle", type=click.Path(exists=True))
@click.argument("checkpoint", type=click.Path(exists=True))
@click.option("--part", "parts", multiple=True, required=True, help="stage0, stage1 …, text or vae.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(bundle: str, checkpoint: str, parts: tuple[str, ...], threads: int, as_json: bool) -> None:
    """Compare parts of BUNDLE with CHECKPOINT."""
    with load(bundle) as pipeline:
        manifest = pipeline.bundle.manifest
        known = [key.name for key in manifest.graphs if key.role == STAGE]
        known += ["text"] * bool(manifest.text) + ["vae"] * bool(manifest.decoder)
    for part in parts:
        if part not in known:
            raise click.UsageError(f"{bundle} has no part '{part}': expected one of {', '.join(known)}")
    documents = []
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            sides = {}
            for side in ("reference", "bundle"):
                file = f"{folder}/{side}.npz"
                command = [sys.executable, __file__, "--child", side, part, bundle, checkpoint, str(threads), file]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                with np.load(file) as values:
                    sides[side] = dict(values)
        errors = {
            name: distance(sides["bundle"][name], value).relative_l2 for name, value in sides["reference"].items()
        }
        documents.append({"part": part, **json.loads(output.splitlines()[-1]), "relative_l2": errors})
    if as_json:
        click.echo(json.dumps(documents, indent=1))
        return
    table = Table("part", "relative L2", "seconds", "load", "peak MiB", "planned MiB")
    for row in documents:
        for name, error in row["relative_l2"].items():
            table.add_row(f"{row['part']} {name}", f"{error:.2e}")
        table.add_row(
            row["part"],
            "",
            f"{row['seconds']:.2f}",
            f"{row['load']:.2f}",
            f"{row['anonymous'] / 2**20:,.0f}",
            f"{row['planned'] / 2**20:,.0f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
