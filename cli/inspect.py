"""`pyrexport inspect`: what a checkpoint holds and what sampling it costs, from headers alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.manifest import MANIFEST_FILE
from ..runtime.bundle.opening import is_bundle, open_bundle
from ..runtime.chain.pyramid import Resolution
from ..runtime.documents import read_json
from ..runtime.errors import UsageError
from ..runtime.model.description import ModelDescription, bare_model
from ..runtime.model.families.wan import WanConfig, flops_per_forward, transformer_tensors
from ..runtime.proof.measure import predicted_peaks
from .common import ResolutionType, output_options, print_json, print_memory, print_table, progress, resolve_checkpoint

PLAIN_STEPS = (50, 4, 2)
"""Plain Wan's schedules in the paper's cost table."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--resolution", type=ResolutionType(), help="In place of the model's own; needed for a bare config.json.")
@click.option("--verify", is_flag=True, help="Hash every file of a bundle again.")
@output_options
def command(model: Path, resolution: Resolution | None, verify: bool, as_json: bool, quiet: bool) -> None:
    """Show MODEL: a bundle, a checkpoint, or a bare transformer config.json with --resolution."""
    if is_bundle(model):
        if resolution is not None:
            raise UsageError(f"{model} is a bundle, whose resolution is fixed")
        document = _describe_bundle(model, verify, quiet)
    elif verify:
        raise UsageError("--verify is for bundles: a checkpoint carries no hashes")
    else:
        document = describe(model, resolution)
    if as_json:
        print_json(document)
    else:
        show(document)


def describe(model: Path, resolution: Resolution | None) -> dict[str, Any]:
    """The JSON document of a checkpoint or a configuration.

    Raises:
        UsageError: the path is neither, or what it holds is malformed.
    """
    bare = model / "config.json" if model.is_dir() else model
    if not (model / "model_index.json").is_file() and bare.is_file():
        return _describe_config(bare, resolution)
    if not model.is_dir():
        raise UsageError(f"{model} does not exist: expected a checkpoint folder or a transformer's config.json")
    checkpoint = resolve_checkpoint(model, resolution)
    components = {
        name: {
            "parameters": sum(tensor.elements for tensor in tensors.values()),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
        }
        for name, tensors in checkpoint.components.items()
    }
    transformer = components["transformer"]
    return {
        "model": str(model),
        "assumed": None,
        **_costs(checkpoint.model, checkpoint.config),
        "parameters": transformer["parameters"],
        "bytes": transformer["bytes"],
        "components": components,
    }


def _describe_bundle(folder: Path, verify: bool, quiet: bool) -> dict[str, Any]:
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    with progress(quiet or not verify) as bar:
        task = bar.add_task("hashing", total=nbytes)
        manifest = open_bundle(folder, verify=verify, advance=lambda n: bar.advance(task, n)).manifest
    shapes = transformer_tensors(manifest.config, manifest.model.pyramid.kind, manifest.model.pyramid.patch_sizes)
    return {
        "model": str(folder),
        "assumed": None,
        "target": manifest.target,
        "engine": f"{manifest.engine} {manifest.engine_version}",
        "precision": {"storage": manifest.storage, "text": manifest.text_storage, "compute": manifest.compute},
        **_costs(manifest.model, manifest.config),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "bytes": manifest.weight_bytes,
        "vae": manifest.document.get("vae"),
        "files": {name: entry.nbytes for name, entry in manifest.files.items()},
        "peak_anonymous_bytes": predicted_peaks(
            {name: graph.memory for name, graph in manifest.graphs.items()},
            manifest.vae.tiles if manifest.vae else None,
            manifest.model.pyramid.resolution.frames,
        ),
        "verified": verify,
        "facts": {name: dict(graph.facts) for name, graph in manifest.graphs.items() if graph.facts},
        "parity": manifest.parity,
        "graph_parity": manifest.graph_parity,
        "provenance": manifest.provenance,
    }


def _describe_config(source: Path, resolution: Resolution | None) -> dict[str, Any]:
    if resolution is None:
        raise UsageError(f"{source} says nothing of a resolution: give one, such as --resolution 81x448x832")
    config = WanConfig.from_json(read_json(source), str(source))
    model = bare_model(config, resolution)
    parameters = sum(math.prod(shape) for shape in transformer_tensors(config, "pyramidal").values())
    costs = _costs(model, config)
    plain = flops_per_forward(config, model.pyramid.stages[0].tokens, model.text_length) / 1e12
    for steps in PLAIN_STEPS:
        costs["schedules"][f"0-0-{steps}"] = {
            "steps": [0, 0, steps], "guidance_scale": 5.0 if steps == 50 else 1.0, "tflop": steps * plain,
            "passes": 2 if steps == 50 else 1,
        }  # fmt: skip
    return {
        "model": str(source),
        "assumed": "pyramidal, three stages, Haar, first frame apart, the paper's schedules (0-0-n: plain Wan), float32",
        **costs,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "components": {"transformer": {"parameters": parameters, "bytes": 4 * parameters, "dtypes": ["F32"]}},
    }


def _costs(model: ModelDescription, config: WanConfig) -> dict[str, Any]:
    pyramid = model.pyramid
    tflop = [
        flops_per_forward(config, stage.tokens, model.text_length, stage.patch_size) / 1e12 for stage in pyramid.stages
    ]
    schedules = {}
    for name, entry in model.schedules.items():
        plan = entry.schedule(name, pyramid)
        schedules[name] = {
            "steps": list(plan.steps),
            "levels": [list(levels) for levels in plan.levels],
            "guidance_scale": plan.guidance_scale,
            "tflop": sum(n * cost for n, cost in zip(plan.steps, reversed(tflop), strict=True)),
            "passes": 2 if plan.guided else 1,
        }
    return {
        "kind": pyramid.kind,
        "resolution": str(pyramid.resolution),
        "wavelet": model.wavelet if pyramid.axes else None,
        "text_length": model.text_length,
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
            for stage, cost in zip(pyramid.stages, tflop, strict=True)
        ],
        "schedules": schedules,
        "default_schedule": model.default_schedule,
    }


def _tflop(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


def show(document: Mapping[str, Any]) -> None:
    """Print the document as tables."""
    click.echo(f"{document['model']}: {document['kind']} at {document['resolution']}")
    if document["assumed"]:
        click.echo(f"assumed: {document['assumed']}")
    print_table(
        "stages",
        ["stage", "latent C,T,H,W", "patch", "tokens", "natural levels", "TFLOP per forward"],
        [
            [
                str(stage["stage"]),
                "x".join(map(str, stage["latent"])),
                "x".join(map(str, stage["patch_size"])),
                f"{stage['tokens']:,}",
                f"{stage['levels'][0]:.4f} to {stage['levels'][1]:.4f}",
                f"{stage['tflop']:,.3f}" if stage["tflop"] >= 0.1 else f"{stage['tflop']:.3g}",
            ]
            for stage in document["stages"]
        ],
    )
    print_table(
        "schedules",
        ["schedule", "guidance scale", "TFLOP per pass", "passes", "TFLOP"],
        [
            [
                name,
                f"{s['guidance_scale']:g}",
                _tflop(s["tflop"]),
                str(s["passes"]),
                _tflop(s["passes"] * s["tflop"]),
            ]
            for name, s in document["schedules"].items()
        ],
    )
    if "components" in document:
        print_table(
            "weights",
            ["component", "parameters", "bytes", "dtype"],
            [
                [name, f"{part['parameters']:,}", f"{part['bytes']:,}", ", ".join(part["dtypes"])]
                for name, part in document["components"].items()
            ],
        )
    else:
        print_table("files", ["file", "bytes"], [[name, f"{size:,}"] for name, size in document["files"].items()])
        _show_engines(document["facts"])
        print_memory(document["peak_anonymous_bytes"])
        click.echo(_state_of(document))


def _show_engines(facts: Mapping[str, Any]) -> None:
    """What was found of TensorRT's engines when they were built."""
    rows = [
        [
            name,
            ", ".join(map(str, found["compute_capabilities"])),
            f"{found['fused_attention']} of {found['attention']}",
            str(found["products"]),
            f"{found['weights_bytes']:,}",
            f"{found['activation_bytes'] / 2**20:,.0f}" if found["activation_bytes"] is not None else "",
        ]
        for name, found in facts.items()
        if "network" in found
    ]
    if rows:
        columns = ["graph", "compute capability", "attention fused", "products", "weight bytes", "activations MiB"]
        print_table("engines", columns, rows)


def _proof(name: str, result: Mapping[str, Any] | None, where: str = "") -> str:
    state = f"not measured{where}" if result is None else "passed" if result.get("passed") else "FAILED"
    return f"{name} {state}"


def _state_of(document: Mapping[str, Any]) -> str:
    precision = document["precision"]
    if any("network" in found for found in document["facts"].values()):
        graph, engine = document["graph_parity"], document["parity"]
        proof = f"{_proof('graph parity', graph)}, {_proof('engine parity', engine, ' on a device')}"
    else:
        proof = _proof("parity", document["parity"])
    text = "" if precision["text"] == precision["storage"] else f" (the text encoder in {precision['text']})"
    vae = document["vae"]
    tiles = ""
    if vae is not None and vae["tiles"] > 1:
        size = "x".join(map(str, vae["tile"]))
        tiles = f"frames decoded in {vae['tiles']} tiles of {size} latent pixels, {vae['overhead']:.2f} x the frame; "
    return (
        f"built for {document['engine']}; stored in {precision['storage']}{text}"
        f", computed in {precision['compute']}; {tiles}"
        f"{proof}{'; every file hashed again' * document['verified']}"
    )
