"""`pyrexport build`: a checkpoint to a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import installed_targets, target_names
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import UsageError
from ..runtime.proof.memory import predicted_peaks
from ..runtime.quantisation import CACHE_SCHEMES, COMPONENTS, DECODERS, FLOAT_SCHEMES, METHODS
from ..targets.facts import BuildTarget, find_build_target
from .common import (
    PATH,
    Bars,
    ResolutionType,
    by_component,
    output_options,
    own_options,
    print_json,
    print_memory,
    print_table,
    progress,
)
from .hub import find_model
from .reading import Weights, resolve_checkpoint, weights_options

OWN = [option for target in installed_targets() if isinstance(target, BuildTarget) for option in target.build_options]

AGAIN = f"COMPONENT is one of {', '.join(COMPONENTS)}, without one the transformer; can be given again."


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--target", "target_name", required=True, help=f"One of {', '.join(target_names())}.")
@click.option("-o", "--output", type=PATH, help="Folder of the bundle.")
@click.option(
    "--precision",
    multiple=True,
    metavar="[COMPONENT=]SCHEME",
    help=f"Of what is stored in floating-point numbers: {', '.join(FLOAT_SCHEMES)}. {AGAIN}",
)
@click.option(
    "--quantize",
    multiple=True,
    metavar="[COMPONENT=]METHOD",
    help=f"Of the matrices of blocks: {', '.join(METHODS)}. {AGAIN}",
)
@click.option("--recipe", type=PATH, help="Of pyrexport calibrate: what it chose for the method.")
@click.option(
    "--vae-tile",
    default="auto",
    show_default=True,
    help="Decode frames in tiles: HEIGHTxWIDTH in latent pixels, none, or auto: where a frame would need over 2.3 GB.",
)
@click.option(
    "--vae-caches",
    type=click.Choice(CACHE_SCHEMES),
    default="fp32",
    show_default=True,
    help="What the decoder keeps from frame to frame.",
)
@click.option(
    "--decoder",
    "decoders",
    type=click.Choice(list(DECODERS)),
    multiple=True,
    help="Only this one of the checkpoint's decoders; can be given again.",
)
@own_options(OWN, "own")
@click.option(
    "--resolution",
    "resolutions",
    type=ResolutionType(),
    multiple=True,
    help="In place of the checkpoint's own; can be given again: the first is the default of the bundle.",
)
@weights_options
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--no-run", is_flag=True, help="Do not run each lowered graph once, which takes long at the real size.")
@click.option("--plan", is_flag=True, help="Only say what each graph will need in memory, or in files; write nothing.")
@output_options
def command(
    checkpoint: Path,
    target_name: str,
    output: Path | None,
    precision: tuple[str, ...],
    quantize: tuple[str, ...],
    recipe: Path | None,
    vae_tile: str,
    vae_caches: str,
    decoders: tuple[str, ...],
    own: Mapping[str, Any],
    resolutions: tuple[Resolution, ...],
    weights: Weights,
    force: bool,
    no_run: bool,
    plan: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build a bundle from a CHECKPOINT, a folder or a hub ID. An interrupted build goes on where it stopped."""
    if plan == (output is not None):
        raise UsageError("give either -o OUTPUT to build, or --plan to only say what it will need")
    target = find_build_target(target_name)
    checkpoint = find_model(checkpoint, weights.files.variant, quiet=quiet)
    opened = resolve_checkpoint(checkpoint, resolutions[0] if resolutions else None, weights)
    from ..export.bundle.build import build_bundle
    from ..export.bundle.options import BuildRequest, resolve_options
    from ..export.bundle.output import check_replaceable
    from ..export.weights.lora import read_changes

    schemes = by_component(precision, "--precision"), by_component(quantize, "--quantize")
    request = BuildRequest(*schemes, recipe, vae_tile, vae_caches, own, decoders, resolutions)
    options = resolve_options(opened, target, request)
    if output is None:
        return _plan(opened, target, options, as_json=as_json, quiet=quiet)
    check_replaceable(output, force)
    with progress(quiet) as bar:
        build_bundle(opened, target, output, options, force=force, run_graphs=not no_run, reporter=Bars(bar))
        changes = read_changes(opened)
    _show(output, target_name, options, changes, as_json=as_json)


def _show(output: Path, target: str, options: Any, changes: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    nbytes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if as_json:
        quantised = {component: scheme.name for component, scheme in options.quantised.items()}
        stored = {"precision": dict(options.precision), "quantised": quantised}
        print_json({"bundle": str(output), "target": target, **stored, "loras": changes, "files": nbytes})
    else:
        click.echo("".join(map(_said_of, changes)), nl=False)
        click.echo(f"{output}: {len(nbytes)} files, {sum(nbytes.values()):,} bytes")


def _said_of(change: Mapping[str, Any]) -> str:
    """One line of what a LoRA changed."""
    layers = change["layers"]
    ranks = sorted({layer["rank"] for layer in layers if layer["rank"] is not None})
    rank = f"rank {'-'.join(map(str, ranks[:: max(1, len(ranks) - 1)]))}, " if ranks else ""
    sizes = sorted(layer["relative_change"] or 0.0 for layer in layers)
    middle = f"{100 * sizes[len(sizes) // 2]:.2g} % in the middle, {100 * sizes[-1]:.2g} % at most"
    return f"{change['file']} at scale {change['scale']:g}: {len(layers)} tensors, {rank}changed by {middle}\n"


def _plan(checkpoint: Any, target: BuildTarget, options: Any, *, as_json: bool, quiet: bool) -> None:
    from ..export.bundle.planning import plan_bundle

    with progress(quiet) as bar:
        plan = plan_bundle(checkpoint, target, options, reporter=Bars(bar))
    decoders = options.decoders_of(checkpoint, packed=target.packs_caches)
    peaks = {
        size: predicted_peaks(plan.memory[size], next(iter(each), None), size.frames, target.process_bytes)
        for size, each in decoders.items()
        if size in plan.memory
    }
    if as_json:
        document = {str(size): {"peak_anonymous_bytes": found} for size, found in peaks.items()}
        print_json({"model": str(checkpoint.folder), "resolutions": document, "files": dict(plan.files)})
        return
    for size, found in peaks.items():
        print_memory(found, str(size))
    if plan.files:
        rows = [[name, f"{nbytes:,}"] for name, nbytes in plan.files.items()]
        print_table("files that will hold weights", ("file", "bytes expected"), rows)
