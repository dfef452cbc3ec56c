"""Train the tiny decoder of the demonstration: it learns what the VAE makes of latents, clean ones and a little noisy.

python scripts/train_tiny_decoder.py RUN CHECKPOINT [--steps 3000]
"""

import math
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import click
import torch
from moving_shapes import SIZE
from pyrexport.export.families.tiny_decoder import TinyDecoder
from pyrexport.runtime.files import file_digest
from pyrexport.runtime.model.families import TinyDecoderConfig
from refine_decoder import NOISE, WEIGHTS, edges_of
from shapes_checkpoint import write_weights
from torch import nn
from train_shapes_vae import clips_of, decode_clips, encode_clips, load_vae, round_to_half
from training_loop import Job, Loop, claim_run, random_of

CONFIG = TinyDecoderConfig(widths=(48, 24, 16, 16))
STEPS_OF_LESSON = 3
EDGE_WEIGHT = 4.0
"""Of a pixel within two of an edge, beside 1."""


@torch.no_grad()
def initialise(decoder: TinyDecoder) -> None:
    """Unit gain, memory blocks that begin as almost nothing beside what goes around them, and an even grey."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d):
            ends = name.endswith("conv.4") or name == CONFIG.last_layer
            module.weight.normal_(0, (0.2 if ends else 1.0) * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    decoder.get_submodule(CONFIG.last_layer).bias.fill_(0.5)


def distil(job: Job, folder: Path) -> TinyDecoder | None:
    """Take steps; the decoder, once all are taken."""
    torch.manual_seed(job.seed)
    vae, decoder = load_vae(folder, job.device), TinyDecoder(CONFIG)
    initialise(decoder)
    decoder.to(job.device)
    mean, std = (
        torch.tensor(values, device=job.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    loop = Loop(job.run / "tiny.pt", dict(decoder.named_parameters()), job.steps, 2e-3, job.deadline)

    @lru_cache(maxsize=1)
    @torch.no_grad()
    def lesson(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and the clips that the VAE makes of them: dearer than a step, so that several share one."""
        random = random_of(job.seed, "tiny", number)
        whole = number * STEPS_OF_LESSON >= 0.9 * job.steps
        count = max(1, job.batch // (4 if whole else 1))
        _, video = clips_of(random, count, job.device, SIZE if whole else SIZE // 2)
        torch.manual_seed(int(random.integers(2**62)))
        latents = (encode_clips(vae, video).mode() - mean) / std
        latents += NOISE * torch.rand(len(video), 1, 1, 1, 1, device=job.device) * torch.randn_like(latents)
        return latents, decode_clips(vae, latents * std + mean).clamp(-1, 1)

    def loss_of(step: int) -> torch.Tensor:
        latents, taught = lesson(step // STEPS_OF_LESSON)
        made = torch.stack([decoder.decoder(each.transpose(0, 1))[3:].transpose(0, 1) for each in latents])
        error = 2 * made - 1 - taught
        return ((1 + EDGE_WEIGHT * edges_of(taught)) * (error.abs() + error**2)).mean()

    if not loop.run(loss_of, job.run / "log.jsonl"):
        return None
    for name, parameter in decoder.named_parameters():
        parameter.data.copy_(loop.average[name])
    return round_to_half(decoder)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=math.inf, help="Stop, resumable, after this long."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(run: Path, checkpoint: Path, device: str, steps: int, batch: int, minutes: float, seed: int) -> None:
    """Train in RUN (again, to go on) a tiny decoder for CHECKPOINT, and put it beside its VAE when done."""
    output, folder = checkpoint / "tiny_decoder", checkpoint / "vae"
    if output.exists():
        raise click.UsageError(f"{output} exists: remove it, or leave it as it is")
    if not (folder / WEIGHTS).is_file():
        raise click.UsageError(f"{folder / WEIGHTS} is missing: expected a checkpoint with a VAE of its own")
    settings = {"vae": file_digest(folder / WEIGHTS), "steps": steps, "batch": batch, "seed": seed}
    claim_run(run, {**settings, "widths": list(CONFIG.widths)})
    deadline = time.monotonic() + 60 * minutes
    decoder = distil(Job(run, device, seed, steps, batch, deadline, batch), folder)
    if decoder is None:
        print("time is up: run again to go on", flush=True)
        return
    partial = Path(tempfile.mkdtemp(prefix=".tiny_decoder.", dir=checkpoint.absolute()))
    partial.chmod(0o755)
    write_weights(partial / WEIGHTS, decoder.state_dict())
    partial.replace(output)
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
