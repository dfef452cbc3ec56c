"""One stage at real width, ONNX Runtime and ExecuTorch beside PyTorch, in alternation.

    python scripts/bench_stages.py [--preset wan2.1-1.3b] [--blocks 2] [--stage 1] [--threads 2] [--runs 3]

Each contender is a process of its own that waits while the others run. Share is of the fastest float32 (or bfloat16)
matrix product (2048 x 2048; 512 x 512 in bfloat16) that PyTorch reaches here on the same threads. Memory is the peak
of anonymous memory.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import onnxruntime
from rich.console import Console
from rich.table import Table

CONTENDERS = {
    "torch eager fp32": ("torch", "float32"),
    "torch eager bf16": ("torch", "bfloat16"),
    "torch.compile bf16": ("compile", "bfloat16"),
    "ort fp32, weights shared": ("ort", "fp32"),
    "ort fp32, prepacked": ("prepacked", "fp32"),
    "ort fp16 stored": ("ort", "fp16"),
    "ort bf16 stored": ("ort", "bf16"),
    "executorch fp32": ("executorch", "fp32"),
    "executorch w8a8-dynamic": ("executorch", "w8a8-dynamic"),
    "executorch w4a8": ("executorch", "w4a8"),
}
for provider in onnxruntime.get_available_providers():
    if provider not in ("CPUExecutionProvider", "AzureExecutionProvider"):
        CONTENDERS |= {f"ort {name}, {provider}": (provider, name) for name in ("fp32", "fp16")}
OWN: dict[str, dict[str, Any]] = {
    "ort": {},
    "executorch": {},
    "prepacked": {"prepack": True},
    "openvino": {},
    "openvino bf16": {"arithmetic": "bf16"},
}
"""How bundles are opened by the kind of contender; of others, the kind is ONNX Runtime's provider."""
BASELINE = "torch eager fp32"
LEVEL = 0.5
"""Natural level that stages are evaluated at."""
SLOW = 0.1
"""A contender in bfloat16 is left out where its matrix products reach less than this share of float32's."""


class Contender:
    """A process that answers each line with a forward's seconds and its peak memory."""

    def __init__(self, script: str, *arguments: str) -> None:
        """Start a script's `--child`; the first answer, a forward to warm up, is waited for."""
        command = [sys.executable, script, "--child", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException("a contender stopped before it answered")
        self.last: dict[str, Any] = json.loads(line)
        return self.last

    def run(self) -> None:
        """One forward."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(self.answer()["seconds"])

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def child(kind: str, precision: str, model: str, stage: str, threads: str) -> None:
    """Forward one stage for each line of standard input, after one to warm up."""
    if kind in ("torch", "compile"):
        forward = _torch(kind, precision, model, int(stage), int(threads))
    else:
        forward = _ort(kind, model, int(stage), int(threads))

    def timed() -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    answer_lines(timed)


def answer_lines(measure: Callable[[], float]) -> None:
    """Measure once, then once for each line of standard input; seconds and peak memory go to standard output."""
    from pyrexport.runtime.proof.memory import MemoryWatch

    with MemoryWatch() as memory:
        while True:
            print(json.dumps({"seconds": measure(), "anonymous": memory.anonymous}), flush=True)
            if not sys.stdin.readline():
                return


def _ort(kind: str, bundle: str, stage: int, threads: int) -> Any:
    import numpy as np
    import pyrexport
    from pyrexport.runtime.bundle.graphs import stage_key
    from pyrexport.runtime.chain.plan import single_step

    pipeline = pyrexport.load(bundle, threads=threads, **OWN.get(kind, {"provider": kind}))
    model, place = pipeline.model, pipeline.bundle.manifest.stages[stage]
    step = single_step(model.pyramid, place, LEVEL)
    latent = np.random.default_rng(0).standard_normal(place.latent).astype(np.float32)
    conditions = {"text": np.zeros((model.text_length, model.transformer.text_dim), np.float32)}
    pipeline.open(stage_key(stage))
    return lambda: pipeline.velocity(step, latent, conditions)


def _torch(kind: str, precision: str, checkpoint: str, stage: int, threads: int) -> Any:
    import torch
    from pyrexport.export.families.wan.modules import load_transformer
    from pyrexport.runtime.model.checkpoint import read_checkpoint

    torch.set_num_threads(threads)
    opened = read_checkpoint(Path(checkpoint))
    model, place, dtype = opened.model, opened.model.stages(opened.resolution)[stage], getattr(torch, precision)
    module: Any = load_transformer(opened)[stage].to(dtype)
    if kind == "compile":
        module = torch.compile(module)
    latent = torch.randn(1, *place.latent, dtype=dtype)
    text = torch.zeros(1, model.text_length, model.transformer.text_dim, dtype=dtype)
    timestep = torch.tensor([model.pyramid.kind.timestep(LEVEL)])

    def forward() -> None:
        with torch.no_grad():
            module(latent, timestep, text)

    return forward


def matmul_peak(threads: int) -> dict[str, float]:
    """FLOP/s of the fastest of ten matrix products in float32 and, within seconds, in bfloat16."""
    import torch

    torch.set_num_threads(threads)
    peaks = {}
    for name, size in (("float32", 2048), ("bfloat16", 512)):
        a = torch.randn(size, size).to(getattr(torch, name))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        peaks[name] = 2 * size**3 / min(times)
    return peaks


def _model(kind: str, precision: str) -> str:
    """The checkpoint, or the bundle, that a contender runs."""
    return {"torch": "checkpoint", "compile": "checkpoint", "executorch": f"executorch {precision}"}.get(
        kind, precision
    )


def _build(folder: Path, preset: str, blocks: int, wanted: set[str]) -> dict[str, str]:
    models = {name: str(folder / name) for name in wanted | {"checkpoint"}}
    options = ["--blocks", str(blocks), "--dtype", "float32", "--no-text-encoder", "--no-vae", "--quiet"]
    run_pyrexport("init", "--random", preset, "-o", models["checkpoint"], *options)
    for name in sorted(wanted - {"checkpoint"}):
        target, _, scheme = name.rpartition(" ")
        own = ["--no-run", "--precision" if scheme == "fp32" else "--quantize", scheme]
        how = ["--target", target, *own] if target else ["--target", "ort", "--precision", scheme]
        run_pyrexport("build", models["checkpoint"], "-o", models[name], *how)
    return models


def run_in_turn(contenders: Mapping[str, Contender], runs: int) -> None:
    """A forward of each, again and again; then they end."""
    for _ in range(runs):
        for contender in contenders.values():
            contender.run()
    for contender in contenders.values():
        contender.close()


def rows_of(
    contenders: Mapping[str, Contender], flop: int, peaks: Mapping[str, float], baseline: str, short: Collection[str]
) -> list[dict[str, Any]]:
    """A row of the table for each contender that ran; those that are `short` compute in bfloat16."""
    least = {name: min(contender.seconds) for name, contender in contenders.items()}
    return [
        {
            "name": name,
            "min": least[name],
            "median": statistics.median(contender.seconds),
            "ratio": least[name] / least[baseline],
            "gflops": flop / least[name] / 1e9,
            "share": flop / least[name] / peaks["bfloat16" if name in short else "float32"],
            "anonymous": contender.last["anonymous"],
        }
        for name, contender in contenders.items()
    ]


def run_pyrexport(*arguments: str) -> None:
    """Run a command of pyrexport, for what it makes."""
    subprocess.run([sys.executable, "-m", "pyrexport.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "seconds, least", "median", "ratio", "GFLOP/s", "share of matmul", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['min']:.3f}",
            f"{row['median']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['gflops']:.0f}",
            f"{row['share']:.0%}",
            f"{row['anonymous'] / 2**20:,.0f}",
        )
    Console(width=110).print(table)


@click.command()
@click.option("--preset", type=click.Choice(["wan2.1-1.3b", "wan2.1-14b"]), default="wan2.1-1.3b", show_default=True)
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True)
@click.option("--stage", type=click.IntRange(0, 2), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CONTENDERS)), help="May be given more than once.")
@click.option("--json", "as_json", is_flag=True)
def main(preset: str, blocks: int, stage: int, threads: int, runs: int, only: tuple[str, ...], as_json: bool) -> None:
    """Measure every contender that runs here."""
    from pyrexport.runtime.model.checkpoint import read_checkpoint

    peaks = matmul_peak(threads)
    wanted = [name for name in CONTENDERS if name in only or not only]
    slow = peaks["bfloat16"] < SLOW * peaks["float32"]
    for name in [n for n in wanted if slow and CONTENDERS[n][1] == "bfloat16"]:
        click.echo(f"{name}: left out, a bfloat16 product reaches {peaks['bfloat16'] / 1e9:.1f} GFLOP/s here", err=True)
        wanted.remove(name)
    if not wanted:
        raise click.ClickException("no contender is left")
    with tempfile.TemporaryDirectory() as folder:
        models = _build(Path(folder), preset, blocks, {_model(*CONTENDERS[name]) for name in wanted})
        opened = read_checkpoint(Path(models["checkpoint"]))
        model, place = opened.model, opened.model.stages(opened.resolution)[stage]
        flop = model.family.flops(model.transformer, place, model.text_length)
        contenders = {}
        for name in wanted:
            kind, precision = CONTENDERS[name]
            path = models[_model(kind, precision)]
            contenders[name] = Contender(__file__, kind, precision, path, str(stage), str(threads))
        run_in_turn(contenders, runs)
    baseline = BASELINE if BASELINE in contenders else next(iter(contenders))
    short = {name for name in contenders if CONTENDERS[name][1] == "bfloat16"}
    rows = rows_of(contenders, flop, peaks, baseline, short)
    versions = {name: version(name) for name in ("torch", "diffusers", "onnxruntime", "executorch")}
    machine = {
        "platform": platform.platform(),
        "threads": threads,
        "matmul_gflops": {k: v / 1e9 for k, v in peaks.items()},
    }
    if as_json:
        click.echo(json.dumps({"machine": machine, "versions": versions, "flop": flop, "contenders": rows}, indent=2))
        return
    title = (
        f"{preset}, {blocks} blocks, stage {stage}: {place.tokens:,} tokens, {flop / 1e12:.3f} TFLOP, {threads} threads"
    )
    show(rows, title)
    click.echo(f"ratio to {baseline}; matmul peak {peaks['float32'] / 1e9:.0f} GFLOP/s in float32; {versions}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
