"""What each choice of a recipe is worth: the same model, built by variants of it, its videos beside float32's.

    python scripts/ablate_recipe.py CHECKPOINT --calibrate PROMPTS --judge PROMPTS [--other-schedule 10-10-10]

Variants: a migration by all stages, by one, or none; the ranges of each stage, or one for all; extremes, or percentiles
of |x|; the levels of the schedule that is sampled, or those of a longer one; and scales that each run finds, with and
without a migration. The judge's prompts should not be the recipe's.
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
from pyrexport.calibration.search import migration_vector
from pyrexport.export.families import modules_of
from pyrexport.export.weights.stream import read_tensor
from pyrexport.runtime.choices import Choice
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import Floats, Ranges, integer_range
from pyrexport.runtime.recipe import Calibration, read_calibration
from rich.console import Console
from rich.table import Table


def rounded_by(ranges: Ranges, choice: Choice, migration: Floats | None) -> Choice:
    """A static choice with another migration."""
    scale, zero = integer_range(ranges.interval(migration))
    moved = {} if migration is None else {"migration": migration}
    return replace(choice, tensors={"scale": scale, "zero": zero, **moved})


def one_for_all(recipe: Calibration) -> Calibration:
    """The same recipe with the widest range of all stages in each."""

    def joint(ranges: Ranges, choice: Choice) -> Choice:
        own = ranges.interval(choice.migration)
        interval = np.tile(np.stack((own[:, 0].min(), own[:, 1].max())), (recipe.stages, 1))
        scale, zero = integer_range(interval)
        return replace(choice, tensors={**choice.tensors, "scale": scale, "zero": zero})

    return replace(recipe, choices={name: joint(recipe.of(name), choice) for name, choice in recipe.choices.items()})


def without_migration(recipe: Calibration) -> Calibration:
    """The same recipe, inputs as they come."""
    choices = {name: rounded_by(recipe.of(name), choice, None) for name, choice in recipe.choices.items()}
    return replace(recipe, choices=choices)


def by_one_stage(recipe: Calibration, checkpoint: Checkpoint, stage: int) -> Calibration:
    """The same strengths, the migration being that of one stage's inputs."""
    choices = dict(recipe.choices)
    for group in modules_of(checkpoint.model.family).migrations(checkpoint):
        weights, ranges = (read_tensor(checkpoint.transformer[f"{name}.weight"]) for name in group), recipe.of(group[0])
        own = replace(ranges, lowest=ranges.lowest[[stage]], highest=ranges.highest[[stage]])
        strength = choices[group[0]].strength
        if strength:
            vector = migration_vector(list(weights), own, SCHEMES["w8a8"], strength).numpy()
            choices |= {name: rounded_by(ranges, choices[name], vector) for name in group}
    return replace(recipe, choices=choices)


def recipes(checkpoint: Path, prompts: Path, other: str, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Each variant's name, method and file."""
    asked = {"as chosen: all stages' migration": ()}
    asked |= {f"each stage's {percent} %": ("--percentile", percent) for percent in ("99.99", "99.9")}
    asked[f"seen along {other}"] = ("--schedule", other)
    dynamic = ("--quantize", "w8a8-dynamic", "--statistics", str(folder / "0.safetensors"))
    asked["scales of each run, all stages' migration"] = dynamic
    for index, (name, options) in enumerate(asked.items()):
        file = folder / f"{index}.safetensors"
        run_pyrexport("calibrate", str(checkpoint), "--prompts", str(prompts), "-o", str(file), "--quiet", *options)
        yield name, "w8a8-dynamic" if options == dynamic else "w8a8", file
    chosen, opened = read_calibration(folder / "0.safetensors"), read_checkpoint(checkpoint)
    variants = {"no migration": without_migration(chosen), "one range for all stages": one_for_all(chosen)}
    variants |= {f"stage {stage}'s migration": by_one_stage(chosen, opened, stage) for stage in (0, chosen.stages - 1)}
    for name, recipe in variants.items():
        file = folder / f"{name}.safetensors"
        recipe.to_file(file)
        yield name, "w8a8", file


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
