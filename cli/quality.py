"""`pyrexport quality`: how much a bundle's rounding changes videos."""

import math
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.graphs import stage_key
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.proof.quality import QualityLimits, check_quality, check_traces, limits_of
from ..runtime.proof.trace import Trace
from ..runtime.quantisation import COMPONENTS
from .common import PATH, engine_options, output_options, print_json, print_table, progress, require_bundle
from .hub import find_model
from .plots import check_plot, write_plot
from .reading import resolve_checkpoint
from .recording import Recording, recording_options

COLUMNS = ("run", "latent L2", "cosine", "PSNR dB", "SSIM", "motion error", "differences", "sharpness")


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
@engine_options
@output_options
def command(
    bundle: Path,
    reference: Path | None,
    traces: tuple[Path, ...],
    min_psnr: float | None,
    max_motion_error: float | None,
    plot: Path | None,
    engine: EngineOptions,
    as_json: bool,
    quiet: bool,
    **recording: Any,
) -> None:
    """Compare videos of BUNDLE with those of a reference. Exit code 1 if they are too far apart."""
    asked = Recording(**recording)
    _check_usage(reference, traces, asked)
    _check_limits(min_psnr, max_motion_error)
    if plot is not None:
        check_plot(plot)
    bundle = find_model(bundle, quiet=quiet)
    require_bundle(bundle)
    reference = None if reference is None else find_model(reference, asked.weights.files.variant, quiet=quiet)
    with (
        tempfile.TemporaryDirectory() as folder,
        _open(bundle, asked.size_for(traces), asked.decoder, engine) as pipeline,
    ):
        check_traces(pipeline, ())  # before the reference, which may take hours
        if reference is not None:
            _check_model(pipeline, reference, asked)
            traces = (Path(folder) / "trace.safetensors",)
            asked.write(reference, traces[0], bundle, quiet)
        limits = _limits(pipeline, min_psnr, max_motion_error)
        result = _compare(pipeline, [Trace(path) for path in traces], limits, quiet)
    if plot is not None:
        write_plot(plot, result)
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not result["passed"]:
        raise CheckFailed(f"quality failed: {_verdict(result)}")
    if not as_json:
        click.echo(f"quality passed: {_verdict(result)}")


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


def _open(bundle: Path, resolution: Resolution | None, decoder: str | None, engine: EngineOptions) -> Pipeline:
    """The bundle, with a device that answers where it needs one."""
    pipeline = load(bundle, resolution=resolution, decoder=decoder, threads=engine.threads, **engine.own)
    if pipeline.target.needs_device:
        pipeline.open(stage_key(0))
    return pipeline


def _check_model(pipeline: Pipeline, reference: Path, asked: Recording) -> None:
    manifest = pipeline.bundle.manifest
    if resolve_checkpoint(reference, manifest.resolution, asked.weights).model.to_json() != manifest.model.to_json():
        raise UsageError(
            f"{reference} is another model than {pipeline.bundle.folder}: give the one that it was built from"
        )


def _limits(pipeline: Pipeline, min_psnr: float | None, max_motion_error: float | None) -> QualityLimits:
    """Those of the bundle's schemes, or what was given in their place."""
    own = limits_of(*(pipeline.bundle.manifest.scheme(component).name for component in COMPONENTS))
    return QualityLimits(
        own.min_psnr if min_psnr is None else min_psnr,
        own.max_motion_error if max_motion_error is None else max_motion_error,
    )


def _compare(pipeline: Pipeline, traces: list[Trace], limits: QualityLimits, quiet: bool) -> dict[str, Any]:
    runs = [run for trace in traces for run in trace.runs]
    _, frames, *_ = pipeline.bundle.manifest.stages[0].latent
    totals = {"chain": sum(sum(run.schedule.steps) for run in runs), "video": len(runs) * frames}
    with progress(quiet) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        return check_quality(pipeline, traces, limits, advance=lambda level: bar.advance(tasks[level]))


def _show(result: dict[str, Any]) -> None:
    named = enumerate(result["runs"], 1)
    rows = [_row(f"{number}: {_short(run['prompt'])}, seed {run['seed']}", run) for number, run in named]
    limits = result["limits"]
    bounds = ["", "", f">= {limits['min_psnr']:g}", "", f"<= {100 * limits['max_motion_error']:g} %", "", ""]
    stored = ", ".join(f"{component} {scheme}" for component, scheme in result["precision"].items())
    print_table(
        f"quality at {result['resolution']}: {stored}",
        COLUMNS,
        [*rows, _row("median", result["median"]), ["limit", *bounds]],
    )


def _short(prompt: str) -> str:
    return escape(prompt if len(prompt) <= 24 else f"{prompt[:23]}…")  # a table's cells may hold markup


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{figures['relative_l2']:.2e}",
        f"{figures['cosine']:.6f}",
        f"{figures['psnr']:.1f}",
        f"{figures['ssim']:.4f}",
        f"{100 * figures['motion_error']:.2f} %",
        f"{figures['difference_error']:.2e}",
        f"{figures['sharpness']:.3f}",
    ]


def _verdict(result: dict[str, Any]) -> str:
    """The figures that decide; where one of them is out of its limit, those alone."""
    psnr, error = result["median"]["psnr"], result["median"]["motion_error"]
    least, most = result["limits"]["min_psnr"], result["limits"]["max_motion_error"]
    figures = [
        (psnr >= least, f"median PSNR {psnr:.1f} dB (at least {least:g})"),
        (error <= most, f"median motion error {100 * error:.2f} % (at most {100 * most:g})"),
    ]
    return ", ".join(line for good, line in figures if not good or result["passed"])
