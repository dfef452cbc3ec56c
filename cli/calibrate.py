"""`pyrexport calibrate`: what the layers of a checkpoint are given on real sampling runs, as a recipe."""

import time
from pathlib import Path

import click

from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import UsageError
from ..runtime.files import check_output
from .common import (
    PATH,
    Bars,
    Reading,
    output_options,
    print_json,
    progress,
    read_prompts,
    reading_options,
    resolve_checkpoint,
)
from .hub import find_model
from .plots import check_plot
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
    help="Of magnitudes, kept beside the greatest.",
)
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
    plot: Path | None,
    reading: Reading,
    as_json: bool,
    quiet: bool,
) -> None:
    """Collect statistics of CHECKPOINT's activations over prompts; goes on where it was interrupted."""
    _check_outputs(output, plot)
    words = read_prompts(prompts)
    folder = find_model(checkpoint, reading.variant, quiet=quiet)
    found = resolve_checkpoint(folder, reading.resolution, reading.variant)
    chosen = found.model.schedule(schedule)
    from ..calibration.run import CalibrationRequest, calibrate

    start = time.perf_counter()
    with progress(quiet) as bar:
        recipe = calibrate(found, output, CalibrationRequest(words, chosen, seed, percentile), Bars(bar))
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
    check_output(output)
    if plot is not None:
        check_plot(plot)
