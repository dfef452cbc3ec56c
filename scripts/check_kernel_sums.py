"""What AVX2's sums would lose of a bundle's integer products, on the activations of one probe per stage.

    python scripts/check_kernel_sums.py BUNDLE CHECKPOINT|TRACE [--prompt TEXT] [--rows 1024] [--threads 2]

Every MatMulIntegerToFloat is run by the engine, its input and its result kept, and its sums made again in NumPy as
AVX2 adds them and exactly (`kernel_sums.py`). A trace is one that `parity --record` wrote; a checkpoint is recorded
first. Exit code 1 if the engine's results are not those of the kernel that this machine has.

    qemu-x86_64 -cpu Haswell python scripts/check_kernel_sums.py BUNDLE TRACE --rows 64

runs the engine's AVX2 kernel on a machine with VNNI.
"""

import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import click
import numpy as np
from bench_stages import run_pyrexport
from kernel_sums import Product, avx2_sums, exact_sums, listed_kernel, used_kernel, watch
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.pipeline.pipeline import Pipeline, load
from pyrexport.runtime.proof.metrics import distance
from pyrexport.runtime.proof.trace import Trace
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Loss:
    """What AVX2's sums lose of some products."""

    layer: str
    pairs: int
    """Sums of two products."""
    lost: int
    """Those that leave int16."""
    error: float
    """Relative L2 error of the result, of the layer that has the largest share of them."""
    distance: float
    """See `Product.distance`, for the sums of this machine's kernel."""

    @property
    def share(self) -> float:
        """Of pairs that leave int16."""
        return self.lost / self.pairs


def loss(product: Product, kernel: str, most_rows: int) -> Loss:
    """Over rows that lie evenly in a product."""
    rows = np.unique(np.linspace(0, len(product.x) - 1, most_rows).round().astype(int))
    part = replace(product, x=product.x[rows], y=product.y[rows])
    exact = exact_sums(part.x, part.values)
    sums, lost = avx2_sums(part.x, part.values)
    right = part.result(exact)
    error = float(np.linalg.norm(part.result(sums) - right) / np.linalg.norm(right))
    pairs = sums.size * -(-len(part.values) // 2)
    return Loss(part.layer, pairs, lost, error, part.distance(sums if kernel == "avx2" else exact))


def joined(losses: Sequence[Loss]) -> Loss:
    """Named by the worst of them."""
    worst = max(losses, key=lambda each: each.share)
    pairs, lost = sum(each.pairs for each in losses), sum(each.lost for each in losses)
    return Loss(worst.layer, pairs, lost, worst.error, max(each.distance for each in losses))


def by_layer(losses: Iterable[Loss]) -> list[Loss]:
    """A layer's products, which are several where it goes in pieces of tokens, as one."""
    ordered = sorted(losses, key=lambda each: each.layer)
    return [joined(list(group)) for _, group in groupby(ordered, key=lambda each: each.layer)]


@dataclass(frozen=True)
class Checked:
    """A stage at its first probe."""

    layers: list[Loss]
    error: float
    """Relative L2 error of its velocity on this machine, against the trace's."""


def check(pipeline: Pipeline, trace: Trace, kernel: str, rows: int) -> list[Checked]:
    """Every stage."""
    stages = []
    for stage in pipeline.bundle.manifest.stages:
        index = next(k for k, probe in enumerate(trace.probes) if probe.stage == stage.index)
        step = single_step(pipeline.model.pyramid, stage, trace.probes[index].level)
        latent, text = trace.tensor(f"probe.{index}.latent"), trace.tensor("text.0")
        layers = by_layer(loss(product, kernel, rows) for product in watch(pipeline, step, latent, text))
        if not layers:
            raise click.UsageError("no stage has products of integers: build with --quantize w8a8-dynamic or w8a8")
        velocity = pipeline.velocity(step, latent, {"text": text})
        stages.append(Checked(layers, distance(velocity, trace.tensor(f"probe.{index}.velocity")).relative_l2))
    return stages


def show(stages: Sequence[Checked], kernel: str) -> None:
    """Print the table and what ran."""
    table = Table("stage", "its error here", "layers", "pairs", "leave int16", "share", "worst layer", "share", "error")
    for index, stage in enumerate(stages):
        whole = joined(stage.layers)
        worst = max(stage.layers, key=lambda each: each.share)
        figures = (worst.layer, f"{worst.share:.1e}", f"{worst.error:.1e}") if whole.lost else ("", "", "")
        counts = str(len(stage.layers)), f"{whole.pairs:,}", f"{whole.lost:,}", f"{whole.share:.1e}"
        table.add_row(str(index), f"{stage.error:.1e}", *counts, *figures)
    Console(width=120).print(table)
    farthest = max(each.distance for stage in stages for each in stage.layers)
    flags = listed_kernel() or "neither"
    click.echo(f"this machine: {kernel} (its flags: {flags}); AVX2's sums: NumPy, on what the engine was given")
    click.echo(f"the engine's results are those of {kernel}'s sums within {farthest:.2f} of what float32 may round")
    click.echo(f"{platform.platform()}; onnxruntime {version('onnxruntime')}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("reference", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", default="a red circle moving left", show_default=True, help="Of a checkpoint's trace.")
@click.option("--rows", type=click.IntRange(1), default=1024, show_default=True, help="Most rows of a product.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(bundle: Path, reference: Path, prompt: str, rows: int, threads: int) -> None:
    """Make the sums of every stage's first probe again."""
    kernel = used_kernel()
    with tempfile.TemporaryDirectory() as folder, load(bundle, threads=threads) as pipeline:
        file = reference
        if reference.is_dir():
            file = Path(folder) / "trace.safetensors"
            asked = ("--reference", str(reference), "--prompt", prompt, "--quiet")
            run_pyrexport("parity", "--record", str(file), *asked)
        stages = check(pipeline, Trace(file), kernel, rows)
    show(stages, kernel)
    if any(each.distance > 1 for stage in stages for each in stage.layers):
        raise click.ClickException(f"the engine's results are not those of {kernel}'s sums")


if __name__ == "__main__":
    main()
