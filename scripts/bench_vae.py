"""A later latent frame through the decoder: a bundle's graph beside diffusers' own decode, in alternation.

    python scripts/bench_vae.py [--tile 14x26] [--threads 2] [--runs 5] [--integers]

At Wan's real width, random weights. The tiny decoder takes a whole frame of 56x104, of which the time of as many pixels
as a tile has is told. With `--integers`, `w8a8` has its convolutions in integers, by a recipe of a smaller video; its
error is that of the frames. Each contender is a process of its own that waits while the others run.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
from bench_stages import Contender, answer_lines, run_pyrexport
from numpy.typing import NDArray
from pyrexport import load
from pyrexport.runtime.bundle.tiles import parse_tile
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.proof.metrics import distance
from rich.console import Console
from rich.table import Table

FRAMES = 3
CONTENDERS = ("diffusers", "bundle", "bundle, prepacked", "tiny", "tiny, prepacked")
INTEGERS = ("w8a8", "w8a8, prepacked")
WIDTHS = (256, 128, 64, 64)
"""Of taew2_1."""


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
    with load(model, threads=int(threads), prepack="prepacked" in kind, resident=True) as pipeline:
        name = "tiny" if kind.startswith("tiny") else "full"
        decoder = pipeline.bundle.manifest.decoding(name).decoder
        assert decoder is not None
        pixels = np.prod(decoder.tiles.tile)
        given = np.random.default_rng(0).standard_normal((16, FRAMES, *decoder.tiles.tile)).astype(np.float32)

        def run() -> float:
            marks = [time.perf_counter() for _ in pipeline.decode_tile(given, decoder)]
            return float((marks[-1] - marks[-2]) * height * width / pixels)

        answer_lines(run)


def frames_of(bundle: str, tile: str) -> NDArray[np.float32]:
    """The frames of a tile of noise."""
    height, width = map(int, tile.split("x"))
    latent = np.random.default_rng(0).standard_normal((16, FRAMES, height, width)).astype(np.float32)
    with load(bundle) as pipeline:
        decoder = pipeline.bundle.manifest.decoder
        assert decoder is not None
        return np.concatenate(list(pipeline.decode_tile(latent, decoder)))


def write_tiny_decoder(path: Path) -> None:
    """One of TAEHV's size, random weights."""
    from pyrexport.export.families.tiny_decoder import TinyDecoder
    from pyrexport.runtime.model.families import TinyDecoderConfig
    from safetensors.torch import save_file

    save_file(TinyDecoder(TinyDecoderConfig(widths=WIDTHS)).state_dict(), path)


def build_integers(folder: Path, checkpoint: str, build: list[str]) -> str:
    """A bundle whose convolutions are in integers."""
    prompts, recipe, rounded = folder / "prompts.txt", f"{folder}/recipe.safetensors", f"{folder}/rounded"
    prompts.write_text("a prompt\n")
    seen = ["--prompts", str(prompts), "--resolution", "17x128x192", "--schedule", "1-1-1", "--quantize", "vae=w8a8"]
    run_pyrexport("calibrate", checkpoint, "-o", recipe, "--quiet", *seen)
    run_pyrexport(*build, "-o", rounded, "--quantize", "vae=w8a8", "--recipe", recipe)
    return rounded


@click.command()
@click.option("--tile", default="14x26", show_default=True, help="HEIGHTxWIDTH in latent pixels.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--integers", is_flag=True, help="Also with convolutions in integers, which takes a calibration.")
def main(tile: str, threads: int, runs: int, integers: bool) -> None:
    """Measure both."""
    try:
        parse_tile(tile)
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = f"{folder}/checkpoint", f"{folder}/bundle"
        random, tiny = (
            ["--random", "wan2.1-1.3b", "--blocks", "1", "--no-text-encoder"],
            Path(folder, "tiny.safetensors"),
        )
        run_pyrexport("init", *random, "-o", checkpoint, "--quiet")
        write_tiny_decoder(tiny)
        build = ["build", checkpoint, "--target", "ort", "--vae-tile", tile, "--vae-decoder", str(tiny), "--quiet"]
        run_pyrexport(*build, "-o", bundle)
        models = {"diffusers": checkpoint, "bundle": bundle, "tiny": bundle}
        if integers:
            models["w8a8"] = build_integers(Path(folder), checkpoint, build)
        contenders = {
            kind: Contender(__file__, kind, models[kind.partition(",")[0]], tile, str(threads))
            for kind in (*CONTENDERS, *(INTEGERS if integers else ()))
        }
        for _ in range(runs):
            for contender in contenders.values():
                contender.run()
        for contender in contenders.values():
            contender.close()
        if integers:
            error = distance(frames_of(models["w8a8"], tile), frames_of(bundle, tile)).relative_l2
            click.echo(f"w8a8: relative L2 of the frames {error:.1e}")
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
