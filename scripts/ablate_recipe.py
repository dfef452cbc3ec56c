"""What each choice of a recipe is worth: the same model, built by variants of it, its videos beside float32's.

    python scripts/ablate_recipe.py CHECKPOINT --calibrate PROMPTS --judge PROMPTS [--other-schedule 10-10-10]

Variants: the ranges of each stage, or one for all; extremes, or percentiles of |x|; the levels of the schedule that is
sampled, or those of a longer one; and scales that each run finds. The judge's prompts should not be the recipe's.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_stages import run_pyrexport
from pyrexport.runtime.recipe import Calibration, Ranges, integer_range, read_calibration
from rich.console import Console
from rich.table import Table


def one_for_all(recipe: Calibration) -> Calibration:
    """The same recipe with the widest range of all stages in each."""

    def joint(ranges: Ranges) -> Ranges:
        ends = ranges.lowest.min(), ranges.highest.max(), ranges.magnitude.max()
        scale, zero = integer_range(*(np.full(recipe.stages, end, np.float32) for end in ends))
        return replace(ranges, scale=scale, zero=zero)

    return replace(recipe, layers={name: joint(ranges) for name, ranges in recipe.layers.items()})


def recipes(checkpoint: Path, prompts: Path, other: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each variant's name and file."""
    asked = {"each stage's extremes": ()}
    asked |= {f"each stage's {percent} %": ("--percentile", percent) for percent in ("99.99", "99.9")}
    asked[f"each stage's extremes, seen along {other}"] = ("--schedule", other)
    for index, (name, options) in enumerate(asked.items()):
        file = folder / f"{index}.safetensors"
        run_pyrexport("calibrate", str(checkpoint), "--prompts", str(prompts), "-o", str(file), "--quiet", *options)
        yield name, file
    joint = folder / "joint.safetensors"
    one_for_all(read_calibration(folder / "0.safetensors")).to_file(joint)
    yield "the extremes of all stages, in each", joint


def judged(bundle: Path, trace: Path) -> dict[str, Any]:
    """Medians of a bundle's quality."""
    command = [sys.executable, "-m", "pyrexport", "quality", str(bundle), "--trace", str(trace), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise click.ClickException(done.stderr.strip())
    median: dict[str, Any] = json.loads(done.stdout)["median"]
    return median


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--calibrate", "prompts", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--judge", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--other-schedule", default="10-10-10", show_default=True)
def main(checkpoint: Path, prompts: Path, judge: Path, other_schedule: str) -> None:
    """Build and judge every variant."""
    table = Table("recipe", "latent L2", "PSNR dB", "motion error")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = folder / "trace.safetensors"
        reference = ("--reference", str(checkpoint), "--prompts", str(judge), "--quiet")
        run_pyrexport("parity", "--record", str(trace), *reference)
        builds = {"scales of each run (w8a8-dynamic)": ("--quantize", "w8a8-dynamic")}
        for variant, file in recipes(checkpoint, prompts, other_schedule, folder):
            builds[variant] = ("--quantize", "w8a8", "--recipe", str(file))
        for index, (variant, options) in enumerate(builds.items()):
            bundle = folder / f"bundle{index}"
            run_pyrexport("build", str(checkpoint), "--target", "ort", "-o", str(bundle), "--quiet", *options)
            found = judged(bundle, trace)
            figures = f"{found['relative_l2']:.2e}", f"{found['psnr']:.1f}", f"{found['motion_error']:.2%}"
            table.add_row(variant, *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
