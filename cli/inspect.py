"""`pyrexport inspect`: what a checkpoint holds and what sampling it costs, from headers alone."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import Target, find_target
from ..runtime.bundle.manifest import MANIFEST_FILE, Manifest
from ..runtime.bundle.opening import is_bundle, open_bundle
from ..runtime.bundle.sizes import decoder_json
from ..runtime.chain.plan import plan
from ..runtime.chain.pyramid import Resolution
from ..runtime.documents import Fields, read_json
from ..runtime.dtypes import DTYPES
from ..runtime.errors import UsageError
from ..runtime.model.description import Model, bare_model
from ..runtime.model.families import find_family
from ..runtime.model.schedules import schedule_json
from ..runtime.proof.memory import predicted_peaks
from ..runtime.recipe import read_calibration
from .common import PATH, output_options, print_json, progress
from .hub import find_model
from .reading import Reading, reading_options, resolve_checkpoint
from .recipes import recipe_document, show_recipe
from .show import show_model

PLAIN_STEPS = (50, 4, 2)
"""Plain Wan's schedules in the paper's cost table."""


@click.command()
@click.argument("model", type=PATH)
@reading_options
@click.option("--verify", is_flag=True, help="Hash every file of a bundle again.")
@output_options
def command(model: Path, reading: Reading, verify: bool, as_json: bool, quiet: bool) -> None:
    """Show MODEL: a bundle, a checkpoint, a recipe, or a bare transformer config.json with --resolution."""
    model, show = find_model(model, reading.weights.files.variant, quiet=quiet), show_model
    if model.suffix == ".safetensors" and model.is_file():
        if verify or reading != Reading():
            raise UsageError(f"{model} is a file: --verify, --resolution and options of weights are for models")
        document, show = recipe_document(read_calibration(model), model), show_recipe
    elif is_bundle(model):
        reading.weights.refuse_for_bundle(model)
        document = inspect_bundle(model, reading.resolution, verify, quiet)
    elif verify:
        raise UsageError("--verify is for bundles: a checkpoint carries no hashes")
    else:
        document = inspect_model(model, reading)
    if as_json:
        document.pop("engines", None)  # the facts, as people read them
        print_json(document)
    else:
        show(document)


def inspect_model(model: Path, reading: Reading) -> dict[str, Any]:
    """The JSON document of a checkpoint or a configuration.

    Raises:
        UsageError: the path is neither, or what it holds is malformed.
    """
    bare = model / "config.json" if model.is_dir() else model
    if not (model / "model_index.json").is_file() and bare.is_file():
        return _inspect_config(bare, reading.resolution)
    if not model.is_dir():
        raise UsageError(f"{model} does not exist: expected a checkpoint folder or a transformer's config.json")
    checkpoint = resolve_checkpoint(model, reading.resolution, reading.weights)
    components = {
        name: {
            "parameters": sum(tensor.elements for tensor in tensors.values()),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "dtypes": sorted({DTYPES[tensor.dtype].safetensors for tensor in tensors.values()}),
        }
        for name, tensors in checkpoint.components.items()
    }
    networks = [components[name] for name in ("transformer", "transformer_2") if name in components]
    return {
        "model": str(model),
        "assumed": None,
        **_costs(checkpoint.model, checkpoint.resolution),
        "parameters": sum(network["parameters"] for network in networks),
        "bytes": sum(network["bytes"] for network in networks),
        "components": components,
    }


def inspect_bundle(folder: Path, resolution: Resolution | None, verify: bool, quiet: bool) -> dict[str, Any]:
    """The JSON document of a bundle; `engines` is its target's table, where the target is installed and has one."""
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    with progress(quiet or not verify) as bar:
        task = bar.add_task("hashing", total=nbytes)
        opened = open_bundle(folder, resolution=resolution, verify=verify, advance=lambda n: bar.advance(task, n))
    manifest = opened.manifest
    target = _target(manifest, folder)
    facts = {name: dict(graph.facts) for name, graph in manifest.entries.items() if graph.facts}
    table = target.table(facts) if target is not None else None
    return {
        "model": str(folder),
        "assumed": None,
        "target": manifest.target,
        "engine": f"{manifest.engine} {manifest.engine_version}",
        "precision": {**manifest.precision, "compute": manifest.compute},
        "quantised": dict(manifest.quantised),
        **_costs(manifest.model, manifest.resolution),
        "parameters": _parameters(manifest.model),
        "bytes": manifest.weight_bytes,
        "decoders": {name: decoder_json(decoder) for name, decoder in manifest.decoders.items()},
        "files": {name: entry.nbytes for name, entry in manifest.files.items()},
        "peak_anonymous_bytes": _peaks(manifest, target),
        "resolutions": [_summary(manifest.at(size), target) for size in manifest.resolutions],
        "verified": verify,
        "facts": facts,
        "needs_device": target is not None and target.needs_device,
        "parity": manifest.parity.get(str(manifest.resolution)),
        "graph_parity": manifest.graph_parity.get(str(manifest.resolution)),
        "provenance": manifest.provenance,
        "engines": None if table is None else asdict(table),
    }


def _target(manifest: Manifest, folder: Path) -> Target | None:
    """The bundle's target, once it has checked its own part of the manifest; None where it is not installed."""
    try:
        target = find_target(manifest.target)
    except UsageError:
        return None
    for name, graph in manifest.entries.items():
        target.check_facts(Fields(graph.facts, f"{folder / MANIFEST_FILE}: graph '{name}': facts"))
    return target


def _peaks(manifest: Manifest, target: Target | None) -> dict[str, int]:
    return predicted_peaks(
        {key: graph.memory for key, graph in manifest.graphs.items()},
        manifest.decoder,
        manifest.resolution.frames,
        (target or Target).process_bytes,
    )


def _summary(manifest: Manifest, target: Target | None) -> dict[str, Any]:
    """What a sample costs at a resolution."""
    costs = _costs(manifest.model, manifest.resolution)
    schedule = costs["schedules"].get(manifest.model.default_schedule)
    return {
        "resolution": str(manifest.resolution),
        "tokens": [stage["tokens"] for stage in costs["stages"]],
        "tflop": None if schedule is None else schedule["passes"] * schedule["tflop"],
        "tiles": None if manifest.decoder is None else manifest.decoder.tiles.count,
        "peak_anonymous_bytes": _peaks(manifest, target).get("sample"),
        "parity": manifest.parity.get(str(manifest.resolution)),
    }


def _inspect_config(source: Path, resolution: Resolution | None) -> dict[str, Any]:
    if resolution is None:
        raise UsageError(f"{source} says nothing of a resolution: give one, such as --resolution 81x448x832")
    document = read_json(source)
    family = find_family(document, None, str(source))
    model = bare_model(family, family.read_transformer(document, str(source)))
    parameters = _parameters(model)
    try:
        costs = _costs(model, resolution)
    except UsageError as error:
        raise UsageError(f"assumed model: {error}") from None
    plain = costs["stages"][0]["tflop"]
    for steps in PLAIN_STEPS if family.history is None else ():
        costs["schedules"][f"0-0-{steps}"] = {
            "steps": [0, 0, steps],
            "solver": "unipc" if steps == 50 else "euler",
            "guidance_scale": 5.0 if steps == 50 else 1.0,
            "tflop": steps * plain,
            "passes": 2 if steps == 50 else 1,
        }
    return {
        "model": str(source),
        "assumed": f"{family.assumed[0]}, float32",
        **costs,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "components": {"transformer": {"parameters": parameters, "bytes": 4 * parameters, "dtypes": ["F32"]}},
    }


def _parameters(model: Model) -> int:
    pyramid = model.pyramid
    shapes = model.family.transformer_tensors(model.transformer, pyramid.kind, pyramid.patch_sizes)
    return model.experts * sum(math.prod(shape) for shape in shapes.values())


def _costs(model: Model, resolution: Resolution) -> dict[str, Any]:
    """Facts of a model at a resolution; a schedule's FLOPs are those of a pass through what a sample evaluates.

    Of a model that makes videos in chunks a sample is one chunk, and `tflop_later_chunk` that of each after it.
    """
    pyramid, stages = model.pyramid, model.stages(resolution)
    tflop = [model.family.flops(model.transformer, stage, model.text_length) / 1e12 for stage in stages]
    schedules = {}
    for name, entry in model.schedules.items():
        schedule = entry.schedule(name, pyramid)
        schedules[name] = {
            "steps": list(schedule.steps),
            **schedule_json(schedule),
            "passes": 2 if schedule.guided else 1,
        }
        steps = plan(pyramid, resolution, schedule, model.telling_chunks)
        for chunk, what in zip(range(model.telling_chunks), ("tflop", "tflop_later_chunk"), strict=False):
            evaluated = [step for step in steps if step.chunk == chunk and not step.zeroed]
            schedules[name][what] = sum(tflop[step.stage.index] for step in evaluated)
    return {
        "kind": pyramid.kind.name,
        "resolution": str(resolution),
        "wavelet": model.wavelet if pyramid.axes else None,
        "text_length": model.text_length,
        "boundary_ratio": pyramid.boundary,
        "stages": [
            {
                "stage": stage.index,
                "latent": list(stage.latent),
                "patch_size": list(stage.patch_size),
                "grid": list(stage.grid),
                "tokens": stage.tokens,
                "levels": [stage.noisy, stage.clean],
                "tflop": cost,
            }
            for stage, cost in zip(stages, tflop, strict=True)
        ],
        "schedules": schedules,
        "default_schedule": model.default_schedule,
    }
