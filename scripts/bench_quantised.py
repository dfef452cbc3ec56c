"""One stage at real width, every way to quantise it beside float32: seconds, error, bytes and memory, in alternation.

    python scripts/bench_quantised.py [--blocks 2] [--stage 1] [--threads 2] [--runs 3] [--only NAME …]

Random weights: seconds, bytes and memory are those of trained ones, errors are not (`docs/quantisation.md`). Each
contender is a process of its own that waits while the others run; the error is that of the stage's velocity against
the float32 bundle's.
"""

import json
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_stages
import click
import numpy as np
import pyrexport
from bench_stages import LEVEL, Contender, run_pyrexport
from numpy.typing import NDArray
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.proof.metrics import distance
from rich.console import Console
from rich.table import Table

METHODS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16 stored": ("--precision", "bf16"),
    "w8": ("--quantize", "w8"),
    "w4": ("--quantize", "w4"),
    "w8a8-dynamic, kernel avx2": ("--quantize", "w8a8-dynamic", "--kernel", "avx2"),
    "w8a8-dynamic, kernel vnni": ("--quantize", "w8a8-dynamic", "--kernel", "vnni"),
}
TORCH = "torch eager fp32"


def velocity(bundle: Path, stage: int, threads: int) -> NDArray[np.float32]:
    """A stage's velocity of a fixed latent and text."""
    with pyrexport.load(bundle, threads=threads) as pipeline:
        place, model = pipeline.bundle.manifest.stages[stage], pipeline.model
        noise = np.random.default_rng(0)
        latent = noise.standard_normal(place.latent).astype(np.float32)
        text = noise.standard_normal((model.text_length, model.transformer.text_dim)).astype(np.float32)
        out: NDArray[np.float32] = pipeline.velocity(single_step(model.pyramid, place, LEVEL), latent, {"text": text})
        return out


def measure(names: list[str], folder: Path, stage: int, threads: int, runs: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    bundles = {name: folder / f"bundle{index}" for index, name in enumerate(names) if name != TORCH}
    for name, bundle in bundles.items():
        run_pyrexport(
            "build", str(folder / "checkpoint"), "--target", "ort", "-o", str(bundle), "--quiet", *METHODS[name]
        )
    contenders = {}
    for name in names:
        kind, model = ("torch", folder / "checkpoint") if name == TORCH else ("ort", bundles[name])
        contenders[name] = Contender(bench_stages.__file__, kind, "float32", str(model), str(stage), str(threads))
    for _ in range(runs):
        for contender in contenders.values():
            contender.run()
    for contender in contenders.values():
        contender.close()
    exact = velocity(bundles["fp32"], stage, threads)
    rows = []
    for name, contender in contenders.items():
        row = {"name": name, "least": min(contender.seconds), "median": statistics.median(contender.seconds)}
        row |= {"peak": contender.last["anonymous"], "bytes": None, "error": None}
        if name in bundles:
            manifest = json.loads((bundles[name] / "manifest.json").read_text())
            error = distance(velocity(bundles[name], stage, threads), exact).relative_l2
            row |= {"bytes": manifest["weights"]["bytes"], "error": error}
        rows.append(row)
    return rows


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--stage", type=click.IntRange(0, 2), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*METHODS, TORCH]), help="May be given more than once.")
@click.option("--json", "as_json", is_flag=True)
def main(blocks: int, stage: int, threads: int, runs: int, only: tuple[str, ...], as_json: bool) -> None:
    """Measure every method."""
    names = [name for name in (*METHODS, TORCH) if name == "fp32" or not only or name in only]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--blocks", str(blocks), "--dtype", "float32", "--no-text-encoder", "--no-vae", "--quiet"]
        run_pyrexport("init", "--random", "wan2.1-1.3b", "-o", f"{folder}/checkpoint", *options)
        rows = measure(names, Path(folder), stage, threads, runs)
    base = next(row for row in rows if row["name"] == "fp32")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(title=f"Wan2.1-1.3B, {blocks} blocks, stage {stage}, {threads} threads", title_justify="left")
    for column in ("", "seconds, least", "median", "ratio", "error", "bytes", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['least']:.3f}",
            f"{row['median']:.3f}",
            f"{row['least'] / base['least']:.3f}",
            "" if row["error"] is None else f"{row['error']:.1e}",
            "" if row["bytes"] is None else f"{row['bytes'] / base['bytes']:.3f}",
            f"{row['peak'] / 2**20:,.0f}",
        )
    Console(width=110).print(table)
    click.echo(f"{platform.platform()}; onnxruntime {version('onnxruntime')}, torch {version('torch')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        bench_stages.child(*sys.argv[2:])
    else:
        main()
