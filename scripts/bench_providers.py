"""One stage at real width by each provider of the target `ort`, beside PyTorch, in alternation.

    python scripts/bench_providers.py [--blocks 2] [--threads 2] [--runs 5] [--only NAME …] [--memory]

The stage is that of 41x224x416 (4,004 tokens, stage 1 of 81x448x832) as a plain model. Each contender is a process of
its own that waits while the others run; those in 16-bit arithmetic are left out where the machine has none. `--memory`
also opens the three stages of a pyramid that ends there, each provider in a process of its own, without torch.
"""

import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_stages
import click
import openvino
from bench_stages import Contender, matmul_peak, rows_of, run_in_turn, run_pyrexport, show

RESOLUTION = "41x224x416"
LEAN = ("--no-text-encoder", "--no-vae", "--dtype", "float32", "--quiet")
BUNDLES: dict[str, tuple[str, ...]] = {
    "cpu fp32": (),
    "cpu w8": ("--quantize", "w8"),
    "cpu w8a8": ("--quantize", "w8a8"),
    "openvino fp32": ("--provider", "openvino"),
    "openvino w8": ("--provider", "openvino", "--quantize", "w8"),
    "openvino w8a8": ("--provider", "openvino", "--quantize", "w8a8"),
}
CONTENDERS = {
    "torch eager fp32": ("torch", "float32"),
    "torch.compile bf16": ("compile", "bfloat16"),
    "cpu fp32, weights shared": ("ort", "cpu fp32"),
    "cpu fp32, prepacked": ("prepacked", "cpu fp32"),
    "cpu w8": ("ort", "cpu w8"),
    "cpu w8a8": ("ort", "cpu w8a8"),
    "openvino fp32": ("openvino", "openvino fp32"),
    "openvino w8": ("openvino", "openvino w8"),
    "openvino w8a8": ("openvino", "openvino w8a8"),
    "openvino fp32, computed in bf16": ("openvino bf16", "openvino fp32"),
}
BASELINE = "torch eager fp32"
SHORT = {"torch.compile bf16", "openvino fp32, computed in bf16"}


def make_models(folder: Path, blocks: int, wanted: list[str]) -> dict[str, Path]:
    """A checkpoint, a recipe where one is needed, and the bundles that contenders run."""
    models = {name: folder / name.replace(" ", "-") for name in BUNDLES}
    models["checkpoint"], recipe = folder / "checkpoint", folder / "recipe.safetensors"
    size = ("--kind", "plain", "--resolution", RESOLUTION, "--blocks", str(blocks))
    run_pyrexport("init", "--random", "wan2.1-1.3b", "-o", str(models["checkpoint"]), *size, *LEAN)
    if any("w8a8" in name for name in wanted):
        (folder / "prompts.txt").write_text("a cat\n")
        how = ("--prompts", str(folder / "prompts.txt"), "--schedule", "1", "--quiet", "-o", str(recipe))
        run_pyrexport("calibrate", str(models["checkpoint"]), *how)
    for name, options in BUNDLES.items():
        if any(CONTENDERS[each][1] == name for each in wanted):
            own = ("--recipe", str(recipe)) if "w8a8" in options else ()
            build(models["checkpoint"], models[name], *options, *own)
    return models


def build(checkpoint: Path, bundle: Path, *options: str) -> None:
    """A bundle of the target `ort`."""
    run_pyrexport("build", str(checkpoint), "--target", "ort", "-o", str(bundle), "--no-run", "--quiet", *options)


def nodes_of(bundle: Path) -> str:
    """How many nodes of the stage its provider took."""
    facts = json.loads((bundle / "manifest.json").read_text())["graphs"]["stage0"].get("facts", {})
    return f"{facts['nodes']} nodes taken, {sum(facts['left'].values())} left to the CPU" if facts else ""


def show_memory(folder: Path, blocks: int) -> None:
    """What three open stages take, by provider: see `bench_memory.py`."""
    size = ("--resolution", RESOLUTION, "--blocks", str(blocks))
    run_pyrexport("init", "--random", "wan2.1-1.3b", "-o", str(folder / "pyramid"), *size, *LEAN)
    for name in ("cpu fp32", "openvino fp32", "openvino w8"):
        bundle = folder / f"pyramid-{name.replace(' ', '-')}"
        build(folder / "pyramid", bundle, *BUNDLES[name])
        click.echo(f"\n{name}")
        subprocess.run([sys.executable, str(Path(__file__).parent / "bench_memory.py"), str(bundle)], check=True)


@click.command()
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="May be given more than once.")
@click.option("--memory", is_flag=True, help="Also what three open stages take.")
def main(blocks: int, threads: int, runs: int, only: tuple[str, ...], memory: bool) -> None:
    """Measure every contender that runs here."""
    from pyrexport.runtime.model.checkpoint import read_checkpoint

    peaks, wanted = matmul_peak(threads), [name for name in CONTENDERS if name in only or not only]
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        click.echo("contenders in bfloat16 are left out: the CPU has no arithmetic for it", err=True)
        wanted = [name for name in wanted if name not in SHORT]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder, blocks, wanted)
        opened = read_checkpoint(models["checkpoint"])
        model, (place,) = opened.model, opened.model.stages(opened.resolution)
        flop = model.family.flops(model.transformer, place, model.text_length)
        contenders = dict[str, Contender]()
        for each in wanted:
            kind, what = CONTENDERS[each]
            path = models.get(what, models["checkpoint"])
            contenders[each] = Contender(bench_stages.__file__, kind, what, str(path), "0", str(threads))
        run_in_turn(contenders, runs)
        baseline = BASELINE if BASELINE in contenders else wanted[0]
        rows: list[dict[str, Any]] = rows_of(contenders, flop, peaks, baseline, SHORT)
        versions = {each: version(each) for each in ("torch", "onnxruntime", "openvino")}
        show(rows, f"{place.tokens:,} tokens, {blocks} blocks, {flop / 1e12:.3f} TFLOP, {threads} threads")
        click.echo(f"{platform.platform()}; ratio to {baseline}; {versions}")
        for each in wanted:
            taken = nodes_of(models[CONTENDERS[each][1]]) if CONTENDERS[each][1] in BUNDLES else ""
            if taken:
                click.echo(f"{each}: {taken}")
        if memory:
            show_memory(folder, blocks)


if __name__ == "__main__":
    main()
