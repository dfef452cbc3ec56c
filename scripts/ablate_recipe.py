"""What each choice of a recipe is worth: the same model, built by variants of it, its videos beside float32's.

    python scripts/ablate_recipe.py CHECKPOINT --calibrate PROMPTS --judge PROMPTS [--other-schedule 10-10-10]

Variants: as `calibrate` chooses; every input migrated, by all stages or by one; the ranges of each stage, or one for
all; extremes, or percentiles of |x|; the levels of the schedule that is sampled, or those of a longer one; and scales
that each run finds. The judge's prompts should not be the recipe's.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_stages import run_pyrexport
from pyrexport.calibration.search import migration_vector
from pyrexport.export.families import modules_of
from pyrexport.export.weights.edits import read_tensor
from pyrexport.runtime.choices import Choice
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import Ranges, integer_range
from pyrexport.runtime.recipe import Calibration, read_calibration
from rich.console import Console
from rich.table import Table

STRENGTH = 0.6
"""Of the migrations: what most groups of the demonstration take where every gain that is predicted counts."""


def one_for_all(recipe: Calibration) -> Calibration:
    """The same recipe with the widest range of all stages in each."""

    def joint(ranges: Ranges, choice: Choice) -> Choice:
        own = ranges.interval(choice.migration)
        interval = np.tile(np.stack((own[:, 0].min(), own[:, 1].max())), (recipe.stages, 1))
        scale, zero = integer_range(interval)
        return replace(choice, tensors={**choice.tensors, "scale": scale, "zero": zero})

    return replace(recipe, choices={name: joint(recipe.of(name), choice) for name, choice in recipe.choices.items()})


def migrated(recipe: Calibration, checkpoint: Checkpoint, stages: Sequence[int]) -> Calibration:
    """The same recipe, every input that can be divided being so, by the extremes of some stages."""
    choices, (method,) = dict(recipe.choices), recipe.methods.values()
    for group in modules_of(checkpoint.model.family).migrations(checkpoint):
        weights, ranges = (read_tensor(checkpoint.transformer[f"{name}.weight"]) for name in group), recipe.of(group[0])
        own = replace(ranges, lowest=ranges.lowest[list(stages)], highest=ranges.highest[list(stages)])
        vector = migration_vector(list(weights), own, SCHEMES[method], STRENGTH).numpy()
        tensors = {"migration": vector}
        if SCHEMES[method].activations == "static":
            tensors["scale"], tensors["zero"] = integer_range(ranges.interval(vector))
        choices |= {name: replace(choices[name], strength=STRENGTH, tensors=tensors) for name in group}
    return replace(recipe, choices=choices)


def recipes(checkpoint: Path, prompts: Path, other: str, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Each variant's name, method and file."""
    taken = ("--statistics", str(folder / "0.safetensors"))
    asked = {"as chosen": ()}
    asked |= {f"each stage's {percent} %": ("--percentile", percent) for percent in ("99.99", "99.9")}
    asked[f"seen along {other}"] = ("--schedule", other)
    asked["scales of each run, as chosen"] = ("--quantize", "w8a8-dynamic", *taken)
    found: dict[str, Calibration] = {}
    for index, (name, options) in enumerate(asked.items()):
        file = folder / f"{index}.safetensors"
        run_pyrexport("calibrate", str(checkpoint), "--prompts", str(prompts), "-o", str(file), "--quiet", *options)
        found[name] = read_calibration(file)
    chosen, dynamic, opened = found["as chosen"], found["scales of each run, as chosen"], read_checkpoint(checkpoint)
    every = range(chosen.stages)
    found["one range for all stages"] = one_for_all(chosen)
    found["all stages' migration"] = migrated(chosen, opened, every)
    found |= {f"stage {stage}'s migration": migrated(chosen, opened, [stage]) for stage in (0, every[-1])}
    found["scales of each run, all stages' migration"] = migrated(dynamic, opened, every)
    for name, recipe in found.items():
        file = folder / f"{name}.safetensors".replace("%", "percent")
        recipe.to_file(file)
        yield name, recipe.methods["transformer"], file


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
        for variant, method, file in recipes(checkpoint, prompts, other_schedule, folder):
            builds[variant] = ("--quantize", method, "--recipe", str(file))
        for index, (variant, options) in enumerate(builds.items()):
            bundle = folder / f"bundle{index}"
            run_pyrexport("build", str(checkpoint), "--target", "ort", "-o", str(bundle), "--quiet", *options)
            found = judged(bundle, trace)
            figures = f"{found['relative_l2']:.2e}", f"{found['psnr']:.1f}", f"{found['motion_error']:.2%}"
            table.add_row(variant, *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
