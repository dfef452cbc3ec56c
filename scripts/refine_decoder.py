"""Train the decoder of the demonstration's VAE further; its encoder stays, and with it what the transformers learned.

    python scripts/refine_decoder.py RUN CHECKPOINT -o VAE [--steps 4000]

Sampled latents are never those of a clip exactly: the decoder sees them with a little noise, and learns edges
foremost, since edges are what tells one shape from another.
"""

import math
import shutil
import tempfile
import time
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKLWan
from moving_shapes import SIZE
from pyrexport.runtime.files import file_digest
from shapes_checkpoint import write_weights
from torch import nn
from train_shapes_vae import clips_of, decode_clips, encode_clips, load_vae, round_to_half
from training_loop import Job, Loop, claim_run, random_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOISE = 0.2
"""The most noise of a latent, in its standard deviations."""
EDGE_WEIGHT = 8.0
"""Of a pixel within two of an edge, beside 1."""


def edges_of(video: torch.Tensor) -> torch.Tensor:
    """Where clips [N, 3, T, H, W] change within two pixels: [N, 1, T, H, W], 0 or 1."""
    window = {"kernel_size": (1, 5, 5), "stride": 1, "padding": (0, 2, 2)}
    spread = nn.functional.max_pool3d(video, **window) + nn.functional.max_pool3d(-video, **window)
    return (spread.amax(1, keepdim=True) > 0.1).float()


def refine(job: Job, vae: AutoencoderKLWan) -> bool:
    """Take steps; whether all are taken."""
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    parameters = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    for p in parameters.values():
        p.requires_grad_(True)
    std = torch.tensor(vae.config.latents_std, device=job.device).view(1, -1, 1, 1, 1)
    loop = Loop(job.run / "decoder.pt", parameters, job.steps, 4e-4, job.deadline)

    def loss_of(step: int) -> torch.Tensor:
        random = random_of(job.seed, "decoder", step)
        whole = step >= 0.9 * job.steps
        _, video = clips_of(random, max(1, job.batch // (4 if whole else 1)), job.device, SIZE if whole else SIZE // 2)
        torch.manual_seed(int(random.integers(2**62)))
        with torch.no_grad():
            latents = encode_clips(vae, video).mode()
            amount = NOISE * torch.rand(len(video), 1, 1, 1, 1, device=job.device)
            latents += amount * std * torch.randn_like(latents)
        error = decode_clips(vae, latents) - video
        return ((1 + EDGE_WEIGHT * edges_of(video)) * (error.abs() + error**2)).mean()

    if not loop.run(loss_of, job.run / "log.jsonl"):
        return False
    for name, p in parameters.items():
        p.data.copy_(loop.average[name])
    return True


def write_vae(out: Path, config: Path, vae: AutoencoderKLWan) -> None:
    """The component's folder, written beside and renamed."""
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    partial.chmod(0o755)
    write_weights(partial / WEIGHTS, vae.state_dict())
    shutil.copyfile(config, partial / "config.json")
    partial.replace(out)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=4000, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=math.inf, help="Stop, resumable, after this long."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    run: Path, checkpoint: Path, output: Path, device: str, steps: int, batch: int, minutes: float, seed: int
) -> None:
    """Refine into RUN (again, to go on) the decoder of CHECKPOINT, and write its VAE when done."""
    if output.exists():
        raise click.UsageError(f"{output} exists: a VAE is written to a new folder")
    folder = checkpoint / "vae"
    if not (folder / WEIGHTS).is_file():
        raise click.UsageError(f"{folder / WEIGHTS} is missing: expected a checkpoint with a VAE of its own")
    settings = {"vae": file_digest(folder / WEIGHTS), "steps": steps, "batch": batch, "seed": seed}
    claim_run(run, settings)
    vae = load_vae(folder, device)
    deadline = time.monotonic() + 60 * minutes
    if not refine(Job(run, device, seed, steps, batch, deadline, batch), vae):
        print("time is up: run again to go on", flush=True)
        return
    write_vae(output, folder / "config.json", round_to_half(vae))
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
