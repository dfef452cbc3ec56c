"""`pyrexport calibrate`: what the layers of a checkpoint are given on real sampling runs, as a recipe."""

import time
from pathlib import Path

import click

from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import UsageError
from ..runtime.model.safetensors import check_tensors_output
from ..runtime.quantisation import SCHEMES
from ..runtime.recipe import KEY
from .common import PATH, Bars, by_component, output_options, print_json, progress, read_prompts
from .hub import find_model
from .plots import check_plot
from .reading import Reading, reading_options, resolve_checkpoint
from .recipes import recipe_document, show_recipe


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--prompts", type=PATH, required=True, help="A file with a prompt a line.")
@click.option("-o", "--output", type=PATH, required=True, help="The recipe, a .safetensors file.")
@click.option("--schedule", help="A schedule of the model, or steps per stage, coarsest first: 10-10-10")
@click.option("--seed", type=click.IntRange(0, MAX_INTEGER), default=0, show_default=True, help="Of the first prompt.")
@click.option(
    "--percentile",
    type=click.FloatRange(0, 100, min_open=True),
    default=100.0,
    show_default=True,
    help="Of magnitudes: what is beyond is cut.",
)
@click.option(
    "--quantize",
    multiple=True,
    metavar="[COMPONENT=]METHOD",
    help="What the recipe is for, of the transformer or the vae; can be given again.  [default: w8a8]",
)
@click.option(
    "--keep",
    type=click.Choice(["auto"]),
    help="auto: measure what rounding each layer costs, and keep the worst as they are, no more than needed.",
)
@click.option("--target-psnr", type=click.FloatRange(min=0), help="Of --keep auto, in dB; default: the method's own.")
@click.option("--statistics", type=PATH, help="A recipe of the same run: only choose anew, from its statistics.")
@click.option("--plot", type=PATH, help="Also draw the ranges into this .png.")
@reading_options
@output_options
def command(
    checkpoint: Path,
    prompts: Path,
    output: Path,
    schedule: str | None,
    seed: int,
    percentile: float,
    quantize: tuple[str, ...],
    keep: str | None,
    target_psnr: float | None,
    statistics: Path | None,
    plot: Path | None,
    reading: Reading,
    as_json: bool,
    quiet: bool,
) -> None:
    """Watch CHECKPOINT's activations over prompts and choose by what layers are rounded; goes on where it stopped."""
    _check_outputs(output, plot)
    if target_psnr is not None and keep is None:
        raise UsageError("--target-psnr is of --keep auto: give both")
    words = read_prompts(prompts)
    folder = find_model(checkpoint, reading.weights.files.variant, quiet=quiet)
    found = resolve_checkpoint(folder, reading.resolution, reading.weights)
    chosen = found.model.schedule(schedule)
    from ..calibration.run import CalibrationRequest, calibrate

    start = time.perf_counter()
    methods = by_component(quantize or ("w8a8",), "--quantize")
    if keep is not None and target_psnr is None:
        target_psnr = max((SCHEMES[name].min_psnr for name in methods.values() if name in SCHEMES), default=0.0)
    request = CalibrationRequest(words, chosen, seed, percentile, methods, target_psnr, statistics)
    with progress(quiet) as bar:
        recipe = calibrate(found, output, request, Bars(bar))
    seconds = time.perf_counter() - start
    if plot is not None:
        from ..calibration.plot import plot_recipe

        plot_recipe(recipe, plot)
    document = {**recipe_document(recipe, output), "plot": None if plot is None else str(plot), "seconds": seconds}
    if as_json:
        print_json(document)
    else:
        show_recipe(document)
        click.echo(f"{', '.join(map(str, filter(None, (output, plot))))}: {seconds:.1f} s")


def _check_outputs(output: Path, plot: Path | None) -> None:
    if output.suffix != ".safetensors":
        raise UsageError(f"a recipe is a .safetensors file, found '{output.name}'")
    check_tensors_output(output, KEY)
    if plot is not None:
        check_plot(plot)
