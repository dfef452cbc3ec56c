"""What a LoRA costs a build: seconds and peak anonymous memory, with and without, in alternation.

    python scripts/bench_lora.py FOLDER [--preset wan2.1-1.3b] [--blocks 30] [--rank 64] [--rounds 2]

Makes a random transformer in FOLDER, and a LoRA of every matrix of its blocks in bfloat16; each build runs in a process
of its own, the report of what the LoRA changed included.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import torch
from pyrexport.runtime.model.checkpoint import read_checkpoint
from safetensors.torch import save_file

CHILD = """
import json, sys, time
from click.testing import CliRunner
from pyrexport.cli import main
from pyrexport.runtime.proof.memory import MemoryWatch
with MemoryWatch() as memory:
    start = time.perf_counter()
    result = CliRunner().invoke(main, sys.argv[1:])
    seconds = time.perf_counter() - start
assert result.exit_code == 0, result.output
print(json.dumps({"seconds": seconds, "anonymous": memory.anonymous}))
"""


def run(*words: object) -> dict[str, float]:
    """A command of pyrexport in a process of its own: its seconds and its peak anonymous bytes."""
    command = [sys.executable, "-c", CHILD, *map(str, words), "--quiet"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def write_lora(checkpoint: Path, rank: int, out: Path) -> int:
    """A LoRA of every matrix of the blocks; how many there are."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, entry in read_checkpoint(checkpoint).transformer.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(entry.shape) == 2:
            layer, (outputs, inputs) = name.removesuffix(".weight"), entry.shape
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw).bfloat16() / 64
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw).bfloat16() / 64
    save_file(tensors, out)
    return len(tensors) // 2


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--preset", default="wan2.1-1.3b", show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=30, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
def main(folder: Path, preset: str, blocks: int, rank: int, rounds: int) -> None:
    """Build with and without a LoRA, and print both."""
    folder.mkdir(exist_ok=True)
    checkpoint, lora = folder / "checkpoint", folder / "lora.safetensors"
    if not checkpoint.exists():
        lean = ("--no-text-encoder", "--no-vae", "--blocks", blocks)
        run("init", "--random", preset, *lean, "-o", checkpoint)
    count = write_lora(checkpoint, rank, lora)
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(rounds):
        for name, more in (("without", ()), ("with", ("--lora", f"{lora}:0.8"))):
            out = folder / "bundle"
            shutil.rmtree(out, ignore_errors=True)
            found[name].append(run("build", checkpoint, "--target", "ort", "-o", out, *more))
    best = {name: min(each["seconds"] for each in runs) for name, runs in found.items()}
    peaks = {name: max(each["anonymous"] for each in runs) / 2**20 for name, runs in found.items()}
    click.echo(f"{preset}, {blocks} blocks, {count} matrices, rank {rank}")
    for name in found:
        click.echo(f"{name:8} {best[name]:7.1f} s   peak {peaks[name]:7.1f} MiB")
    ratio, more = best["with"] / best["without"], peaks["with"] - peaks["without"]
    click.echo(f"ratio {ratio:.3f}, {more:+.1f} MiB")


if __name__ == "__main__":
    main()
