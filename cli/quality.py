"""`pyrexport quality`: how much a bundle's rounding changes videos."""

import math
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ..runtime.bundle.engines import EngineOptions
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.pipeline.pipeline import Pipeline
from ..runtime.proof.quality import QualityLimits, check_traces, limits_of
from ..runtime.quantisation import COMPONENTS
from .cluster import Cluster, cluster_options
from .common import PATH, engine_options, output_options, print_json, print_table, require_bundle
from .comparing import Comparison, compare_elsewhere, compare_here
from .hub import find_model
from .plots import check_plot, write_plot
from .reading import resolve_checkpoint
from .recording import Recording, recording_options
from .reports import (
    RUN_COLUMNS,
    FramePairs,
    Subject,
    check_page,
    quality_page,
    quality_verdict,
    run_rows,
    write_page,
)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--reference", type=PATH, help="The checkpoint: sample it in PyTorch, in float32, and compare.")
@click.option(
    "--trace",
    "traces",
    type=PATH,
    multiple=True,
    help="A recorded trace (parity --record): no PyTorch and no checkpoint is needed. Can be given again.",
)
@recording_options
@click.option("--min-psnr", type=float, help="Least median PSNR in dB, in place of the scheme's own.")
@click.option(
    "--max-motion-error", type=float, help="Largest median error of motion, in place of the scheme's own: 0.05 is 5 %."
)
@click.option("--plot", type=PATH, help="A .png of the errors along the chain and along the videos.")
@click.option("--html", type=PATH, help="A page to look at: limits, curves and frames side by side.")
@cluster_options
@engine_options
@output_options
def command(
    bundle: Path,
    reference: Path | None,
    traces: tuple[Path, ...],
    min_psnr: float | None,
    max_motion_error: float | None,
    plot: Path | None,
    html: Path | None,
    cluster: Cluster,
    engine: EngineOptions,
    as_json: bool,
    quiet: bool,
    **recording: Any,
) -> None:
    """Compare videos of BUNDLE with those of a reference. Exit code 1 if they are too far apart."""
    asked = Recording(**recording)
    _check_usage(reference, traces, asked)
    _check_limits(min_psnr, max_motion_error)
    for path, check in ((plot, check_plot), (html, check_page)):
        if path is not None:
            check(path)
    bundle = find_model(bundle, quiet=quiet)
    require_bundle(bundle)
    reference = None if reference is None else find_model(reference, asked.weights.files.variant, quiet=quiet)
    comparison = Comparison(bundle, reference, traces, asked, engine).on(cluster)
    with comparison.open() as pipeline:
        limits = _check(pipeline, comparison, min_psnr, max_motion_error)
        pairs = FramePairs()
        with cluster.connected(pipeline.target.gpus(pipeline.graphs.options)) as spread:
            if spread is None:
                result, runs = compare_here(pipeline, comparison, limits, pairs, quiet)
            else:
                result, runs = compare_elsewhere(pipeline, comparison, limits, pairs, quiet, spread)
    _print(result, as_json)
    if plot is not None:
        write_plot(plot, result)
    if html is not None:
        origin = ", ".join(map(str, [reference] if reference else traces))
        subject = Subject(bundle, pipeline.bundle.manifest, origin, runs, engine)
        write_page(html, quality_page(subject, result, pairs))
    _conclude(result, as_json)


def _check_usage(reference: Path | None, traces: tuple[Path, ...], asked: Recording) -> None:
    if (reference is None) == (not traces):
        raise UsageError("give either --reference CHECKPOINT or --trace FILE")
    if asked.prompts and asked.prompts_file:
        raise UsageError("give either --prompt or --prompts")
    if traces and asked != Recording(resolution=asked.resolution, decoder=asked.decoder):
        raise UsageError("prompts, seeds, schedules and guidance belong to --reference: a trace has its own")


def _check_limits(min_psnr: float | None, max_motion_error: float | None) -> None:
    if min_psnr is not None and not 0 <= min_psnr <= 100:
        raise UsageError(f"--min-psnr is in dB, from 0 to 100, found {min_psnr:g}")
    if max_motion_error is not None and not 0 <= max_motion_error < math.inf:
        raise UsageError(f"--max-motion-error is a ratio from 0, such as 0.05, found {max_motion_error:g}")


def _check(
    pipeline: Pipeline, comparison: Comparison, min_psnr: float | None, max_motion_error: float | None
) -> QualityLimits:
    """What can be refused before the reference, which may take hours; returns the limits."""
    check_traces(pipeline, comparison.opened())
    manifest, reference = pipeline.bundle.manifest, comparison.reference
    if reference is not None:
        found = resolve_checkpoint(reference, manifest.resolution, comparison.asked.weights)
        if found.model.to_json() != manifest.model.to_json():
            raise UsageError(
                f"{reference} is another model than {pipeline.bundle.folder}: give the one that it was built from"
            )
    return _limits(pipeline, min_psnr, max_motion_error)


def _limits(pipeline: Pipeline, min_psnr: float | None, max_motion_error: float | None) -> QualityLimits:
    """Those of the bundle's schemes, or what was given in their place."""
    own = limits_of(*(pipeline.bundle.manifest.scheme(component).name for component in COMPONENTS))
    return QualityLimits(
        own.min_psnr if min_psnr is None else min_psnr,
        own.max_motion_error if max_motion_error is None else max_motion_error,
    )


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        stored = ", ".join(f"{component} {scheme}" for component, scheme in result["precision"].items())
        rows = [[escape(row[0]), *row[1:]] for row in run_rows(result)]  # a table's cells may hold markup
        print_table(f"quality at {result['resolution']}: {stored}", RUN_COLUMNS, rows)


def _conclude(result: dict[str, Any], as_json: bool) -> None:
    if not result["passed"]:
        raise CheckFailed(f"quality failed: {quality_verdict(result)}")
    if not as_json:
        click.echo(f"quality passed: {quality_verdict(result)}")
