"""A later latent frame through the decoder: a bundle's graph beside diffusers' own decode, in alternation.

    python scripts/bench_vae.py [--tile 14x26] [--threads 2] [--runs 5]

At Wan's real width, random weights. Each contender is a process of its own that waits while the others run.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

import click
import numpy as np
from bench_stages import Contender, answer_lines, run_pyrexport
from pyrexport.runtime.bundle.tiles import parse_tile
from pyrexport.runtime.errors import UsageError
from rich.console import Console
from rich.table import Table

FRAMES = 3
CONTENDERS = ("diffusers", "bundle", "bundle, prepacked")


def child(kind: str, model: str, tile: str, threads: str) -> None:
    """Decode the latent frames of a tile for each line; answer with the seconds of the last one."""
    height, width = map(int, tile.split("x"))
    latent = np.random.default_rng(0).standard_normal((16, FRAMES, height, width)).astype(np.float32)
    if kind == "diffusers":
        import torch
        from diffusers import AutoencoderKLWan

        torch.set_num_threads(int(threads))
        vae = AutoencoderKLWan.from_pretrained(f"{model}/vae").eval()
        times: list[float] = []
        forward = vae.decoder.forward

        def timed(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            result = forward(*arguments, **options)
            times.append(time.perf_counter() - start)
            return result

        vae.decoder.forward = timed

        def decode() -> float:
            with torch.no_grad():
                vae.decode(torch.from_numpy(latent)[None])
            return times[-1]

        answer_lines(decode)
        return
    from pyrexport import load

    with load(model, threads=int(threads), prepack="prepacked" in kind, resident=True) as pipeline:

        def run() -> float:
            marks = [time.perf_counter() for _ in pipeline.decode_tile(latent)]
            return marks[-1] - marks[-2]

        answer_lines(run)


@click.command()
@click.option("--tile", default="14x26", show_default=True, help="HEIGHTxWIDTH in latent pixels.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
def main(tile: str, threads: int, runs: int) -> None:
    """Measure both."""
    try:
        parse_tile(tile)
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = f"{folder}/checkpoint", f"{folder}/bundle"
        random = ["--random", "wan2.1-1.3b", "--blocks", "1", "--no-text-encoder"]
        run_pyrexport("init", *random, "-o", checkpoint, "--quiet")
        run_pyrexport("build", checkpoint, "--target", "ort", "-o", bundle, "--vae-tile", tile, "--quiet")
        contenders = {
            kind: Contender(__file__, kind, checkpoint if kind == "diffusers" else bundle, tile, str(threads))
            for kind in CONTENDERS
        }
        for _ in range(runs):
            for contender in contenders.values():
                contender.run()
        for contender in contenders.values():
            contender.close()
    versions = {name: version(name) for name in ("torch", "diffusers", "onnxruntime")}
    table = Table(
        "", "seconds, least", "median", "ratio", "peak MiB", title=f"a later frame of {tile} latents, {threads} threads"
    )
    least = {kind: min(contender.seconds) for kind, contender in contenders.items()}
    for kind, contender in contenders.items():
        table.add_row(
            kind,
            f"{least[kind]:.3f}",
            f"{statistics.median(contender.seconds):.3f}",
            f"{least[kind] / least['diffusers']:.3f}",
            f"{contender.last['anonymous'] / 2**20:,.0f}",
        )
    Console(width=100).print(table)
    click.echo(f"{platform.platform()}; {json.dumps(versions)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
