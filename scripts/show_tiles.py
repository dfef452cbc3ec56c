"""The demonstration's VAE on a frame that is cut into tiles, beside the same frame decoded whole.

    python scripts/show_tiles.py OUT.png

Two clips side by side make one of 128x256 pixels. Rows: whole, in three tiles, eight times their difference.
"""

import shutil
import tempfile
from pathlib import Path

import click
import numpy as np
import pyrexport
import torch
from click.testing import CliRunner
from moving_shapes import draw, render
from numpy.typing import NDArray
from pyrexport.cli import main as pyrexport_command
from pyrexport.export.init.random import RandomModel, write_random
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.files import check_output
from pyrexport.runtime.pipeline.decoder import frames_from
from pyrexport.runtime.pipeline.video import write_png
from pyrexport.runtime.proof.metrics import psnr
from train_shapes_vae import encode_clips, load_vae

VAE = Path(__file__).resolve().parent.parent / "tests" / "data" / "moving-shapes" / "vae"
FRAMES, TILE = 5, "16x16"


def decode_both(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames [T, H, W, 3] decoded whole and in tiles, by bundles that are built into a folder."""
    checkpoint = folder / "checkpoint"
    size = Resolution(FRAMES, 128, 256)
    write_random(checkpoint, RandomModel("tiny", kind="plain", text_encoder=False, vae=False, resolution=size))
    shutil.copytree(VAE, checkpoint / "vae")
    scenes = np.array([25, 71])
    clips = render(scenes, torch.from_numpy(draw(np.random.default_rng(1), scenes)))
    vae = load_vae(VAE, "cpu")
    latent = encode_clips(vae, torch.cat([clips[0], clips[1]], 3)[None, :, :FRAMES]).mode()[0].numpy()
    mean, std = (
        np.array(v, np.float32)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    videos = []
    for tile in ("none", TILE):
        build = ["build", str(checkpoint), "--target", "ort", "-o", str(folder / tile), "--vae-tile", tile, "--quiet"]
        CliRunner().invoke(pyrexport_command, build, catch_exceptions=False)
        with pyrexport.load(folder / tile) as pipeline:
            videos.append(frames_from(np.concatenate(list(pipeline.decode((latent - mean) / std)))))
    return videos[0], videos[1]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write the picture to OUT, and print the PSNR."""
    try:
        check_output(out)
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        whole, tiled = decode_both(Path(folder))
    difference = np.clip(8 * np.abs(whole[-1].astype(int) - tiled[-1]), 0, 255).astype(np.uint8)
    write_png(out, np.concatenate([whole[-1], tiled[-1], difference]))
    click.echo(f"{out}: PSNR {psnr(tiled, whole):.1f} dB over {len(whole)} frames")


if __name__ == "__main__":
    main()
