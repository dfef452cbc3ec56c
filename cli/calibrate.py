"""`pyrexport calibrate`: what the layers of a checkpoint are given on real sampling runs, as a recipe."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.safetensors import check_tensors_output
from ..runtime.quantisation import SCHEMES
from ..runtime.recipe import KEY
from ..runtime.reporter import Reporter
from ..runtime.trajectories import Trajectories
from .cluster import Cluster, Spread, cluster_options, in_order, require_same
from .common import PATH, Bars, by_component, output_options, print_json, progress, read_prompts
from .hub import find_model
from .plots import check_plot
from .reading import Reading, reading_options, resolve_checkpoint
from .recipes import recipe_document, show_recipe

Opening = Callable[[], Checkpoint]
"""Reads what is calibrated."""


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
@cluster_options
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
    cluster: Cluster,
    reading: Reading,
    as_json: bool,
    quiet: bool,
) -> None:
    """Watch CHECKPOINT's activations over prompts and choose by what layers are rounded; goes on where it stopped."""
    _check_outputs(output, plot)
    _check_usage(keep, target_psnr, statistics, cluster)
    words = read_prompts(prompts)
    folder = find_model(checkpoint, reading.weights.files.variant, quiet=quiet)
    opening = _opening(cluster, folder, reading)
    found = opening()
    chosen = found.model.schedule(schedule)
    from ..calibration.run import CalibrationRequest, calibrate

    start = time.perf_counter()
    methods = by_component(quantize or ("w8a8",), "--quantize")
    target = target_psnr if keep is None or target_psnr is not None else _least_psnr(methods)
    request = CalibrationRequest(words, chosen, seed, percentile, methods, target, statistics)
    with cluster.connected() as spread, progress(quiet) as bar:
        elsewhere = spread and partial(_elsewhere, spread=spread, opening=opening, request=request)
        recipe = calibrate(found, output, request, Bars(bar), elsewhere)
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


def _least_psnr(methods: Mapping[str, str]) -> float:
    """What methods ask of videos themselves, in dB."""
    return max((SCHEMES[name].min_psnr for name in methods.values() if name in SCHEMES), default=0.0)


def _opening(cluster: Cluster, folder: Path, reading: Reading) -> Opening:
    weights = reading.weights if cluster.address is None else reading.weights.absolute()
    return partial(resolve_checkpoint, cluster.path(folder), reading.resolution, weights)


def _elsewhere(
    run: Trajectories, prompts: Sequence[Any], *, spread: Spread, opening: Opening, request: Any
) -> Iterator[Any]:
    """See `calibration.watching.Elsewhere`."""
    import torch

    threads = torch.get_num_threads()
    return in_order(spread(partial(open_worker, opening=opening, request=request, run=run, threads=threads), prompts))


def open_worker(
    stack: ExitStack, *, opening: Opening, request: Any, run: Trajectories, threads: int
) -> Callable[[Any], Any]:
    """What runs prompts in another process, on so many threads: see `cluster.Open`.

    Raises:
        UsageError: it would be another run there, of another checkpoint or by other versions.
    """
    import torch

    from ..calibration.request import trajectories
    from ..calibration.watching import Watcher
    from ..export.reference.reference import Reference

    checkpoint = opening()
    require_same(trajectories(checkpoint, request).to_json(), run.to_json())
    torch.set_num_threads(threads)  # Ray tells libraries to take one
    return Watcher(Reference(checkpoint), request, run, Reporter()).watch


def _check_usage(keep: str | None, target_psnr: float | None, statistics: Path | None, cluster: Cluster) -> None:
    if target_psnr is not None and keep is None:
        raise UsageError("--target-psnr is of --keep auto: give both")
    if statistics is not None and cluster.address is not None:
        raise UsageError("--ray is for prompts that are run: leave it out with --statistics")


def _check_outputs(output: Path, plot: Path | None) -> None:
    if output.suffix != ".safetensors":
        raise UsageError(f"a recipe is a .safetensors file, found '{output.name}'")
    check_tensors_output(output, KEY)
    if plot is not None:
        check_plot(plot)
