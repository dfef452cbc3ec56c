"""`pyrexport build`: a checkpoint to a bundle."""

from pathlib import Path

import click

from ..runtime.bundle.engines import find_target, target_names
from ..runtime.bundle.manifest import CACHE_PRECISIONS, PRECISIONS, TEXT_PRECISIONS
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import UsageError
from ..runtime.proof.measure import predicted_peaks
from .common import Bars, ResolutionType, output_options, print_json, print_memory, progress, resolve_checkpoint


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", "target_name", required=True, help=f"One of {', '.join(target_names())}.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Of the stored matrices.",
)
@click.option(
    "--text-precision", type=click.Choice(list(TEXT_PRECISIONS)), help="Of the text encoder, in place of --precision."
)
@click.option(
    "--vae-tile",
    default="auto",
    show_default=True,
    help="Decode frames in tiles: HEIGHTxWIDTH in latent pixels, none, or auto: where a frame would need over 3 GiB.",
)
@click.option(
    "--vae-caches",
    type=click.Choice(list(CACHE_PRECISIONS)),
    default="fp32",
    show_default=True,
    help="What the decoder keeps from frame to frame.",
)
@click.option(
    "--layout",
    type=click.Choice(["shared", "per-stage"]),
    help="TensorRT: one engine for all stages, weights stored once (the default), or one for each.",
)
@click.option(
    "--compute-capability", "capabilities", multiple=True, metavar="X.Y",
    help="TensorRT: a GPU to build for, such as 8.9; may be given more than once. In place of the GPU that is here.",
)  # fmt: skip
@click.option("--resolution", type=ResolutionType(), help="In place of the checkpoint's own.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option(
    "--no-run", is_flag=True, help="Do not run each lowered graph once (ExecuTorch), which takes long at the real size."
)
@click.option("--plan", is_flag=True, help="Only say what each graph will need in memory; write nothing.")
@output_options
def command(
    checkpoint: Path, target_name: str, output: Path | None, precision: str, text_precision: str | None,
    vae_tile: str, vae_caches: str, layout: str | None, capabilities: tuple[str, ...], resolution: Resolution | None, force: bool,
    no_run: bool, plan: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build a bundle from a CHECKPOINT. An interrupted build goes on where it stopped."""
    if plan == (output is not None):
        raise UsageError("give either -o OUTPUT to build, or --plan to only say what it will need")
    target = find_target(target_name)
    opened = resolve_checkpoint(checkpoint, resolution)
    from ..export.bundle.build import build_bundle, make_options, plan_memory
    from ..export.bundle.output import check_output
    from ..export.bundle.parts import tile_plan

    options = make_options(opened, target, precision, text_precision, vae_tile, vae_caches, layout or "", capabilities)
    if output is None:
        if target.FORM != "onnx":
            raise UsageError(
                f"target '{target_name}' is measured when it is built, not planned: read `inspect BUNDLE` then"
            )
        with progress(quiet) as bar:
            memory = plan_memory(opened, options=options, reporter=Bars(bar))
        tiles = tile_plan(opened, options) if opened.vae else None
        peaks = predicted_peaks(memory, tiles, opened.model.pyramid.resolution.frames)
        if as_json:
            print_json({"model": str(checkpoint), "peak_anonymous_bytes": peaks})
        else:
            print_memory(peaks)
        return
    check_output(output, force)
    with progress(quiet) as bar:
        build_bundle(
            opened, target_name, target, output, options=options, force=force, run_graphs=not no_run, reporter=Bars(bar)
        )
    nbytes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if as_json:
        print_json({"bundle": str(output), "target": target_name, "precision": precision, "files": nbytes})
    else:
        click.echo(f"{output}: {len(nbytes)} files, {sum(nbytes.values()):,} bytes")
