"""What a preview adds to a step of the coarsest stage, where steps are shortest: real width, in one process.

    python scripts/bench_preview.py [--blocks 2] [--threads 2] [--runs 10]

The step and the previews of its latent are measured in alternation: the map alone, as the API's callback has it, and
with the file that `sample --preview` writes. Random weights and a random map: the work is the same.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
from bench_stages import LEVEL, run_pyrexport
from pyrexport.cli.previews import PreviewFile
from pyrexport.cli.samplers import BundleSampler
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.chain.sampler import Step
from pyrexport.runtime.model.preview import Preview
from pyrexport.runtime.pipeline.pipeline import load
from pyrexport.runtime.pipeline.preview import showing
from rich.console import Console
from rich.table import Table


def make_bundle(folder: Path, blocks: int) -> Path:
    """A bundle of the transformer alone, with a map."""
    random = ["--random", "wan2.1-1.3b", "--blocks", str(blocks), "--no-text-encoder", "--no-vae"]
    run_pyrexport("init", *random, "-o", str(folder / "checkpoint"), "--quiet")
    document = folder / "checkpoint" / "pyramid.json"
    rows = np.random.default_rng(0).standard_normal((17, 3)) / 8
    document.write_text(json.dumps(json.loads(document.read_text()) | {"preview_rgb": rows.tolist()}))
    run_pyrexport("build", str(folder / "checkpoint"), "--target", "ort", "-o", str(folder / "bundle"), "--quiet")
    return folder / "bundle"


def nothing(frames: Preview) -> None:
    """What a callback of the API may do."""


def told(show: Callable[[Preview], None], sampler: BundleSampler, model: Path) -> Callable[[Step], None]:
    """What the chain calls after each step."""
    callback = showing(show, sampler.preview, model)
    assert callback is not None
    return callback


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True)
def main(blocks: int, threads: int, runs: int) -> None:
    """Measure a step and its previews."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as name, load(make_bundle(Path(name), blocks), threads=threads) as pipeline:
        place, sampler = pipeline.bundle.manifest.stages[-1], BundleSampler(pipeline)
        step = single_step(pipeline.model.pyramid, place, LEVEL)
        latent = np.random.default_rng(0).standard_normal(place.latent).astype(np.float32)
        text = {"text": np.zeros((pipeline.model.text_length, pipeline.model.transformer.text_dim), np.float32)}
        files = {suffix: PreviewFile(Path(name) / f"now{suffix}", Path(name), sampler) for suffix in (".png", ".gif")}
        shown = {key: told(show, sampler, Path(name)) for key, show in ({"map": nothing} | files).items()}
        taken = Step(step, latent, latent, latent)
        pipeline.velocity(step, latent, text)
        for _ in range(runs):
            timed("a step", lambda: pipeline.velocity(step, latent, text))
            for key, tell in shown.items():
                timed(key, partial(tell, taken))
    table = Table(
        "", "ms, least", "median", "of a step (medians)", title=f"a step of the coarsest stage, {threads} threads"
    )
    whole = statistics.median(seconds["a step"])
    for key, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(key, f"{1000 * min(values):.2f}", f"{1000 * middle:.2f}", f"{middle / whole:.2%}")
    Console(width=100).print(table)
    click.echo(f"{platform.platform()}; onnxruntime {version('onnxruntime')}")


if __name__ == "__main__":
    main()
