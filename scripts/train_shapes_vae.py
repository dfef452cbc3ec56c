"""The VAE of the demonstration checkpoint: its training on clips of moving shapes."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from moving_shapes import FRAMES, SCENES, SIZE, crop, draw, render
from torch import nn
from training_loop import Job, Loop, random_of

VAE = {"base_dim": 8}
KL_WEIGHT = 3e-4


def clips_of(random: np.random.Generator, count: int, device: str, size: int = SIZE) -> tuple[np.ndarray, torch.Tensor]:
    """Scenes [N] and their clips [N, 3, T, H, W], seen through a window around the shape where `size` is smaller."""
    scenes = random.integers(len(SCENES), size=count)
    geometry = draw(random, scenes)
    if size < SIZE:
        geometry = crop(geometry, random, size)
    return scenes, render(scenes, torch.from_numpy(geometry).to(device), size)


def over_whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let `encode_clips` and `decode_clips` run the VAE's layers over all frames at once.

    Diffusers goes chunk by chunk. This gives the same numbers, three times faster on CPU: convolutions are fewer and
    larger, and the norm does without `vector_norm`.
    """
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = partial(_resample, module)
        elif isinstance(module, WanRMS_norm):
            module.forward = partial(_channel_norm, module)
    return vae


def _resample(self: WanResample, x: torch.Tensor, feat_cache: None = None, feat_idx: Any = None) -> torch.Tensor:
    """Its `forward` over a whole clip, whose first frame passes by the convolution over time."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        later = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
    return torch.cat([x[:, :, :1], self.time_conv(x)], 2) if self.mode == "downsample3d" and x.shape[2] > 1 else x


def _channel_norm(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-24) * self.gamma


def encode_clips(vae: AutoencoderKLWan, video: torch.Tensor) -> DiagonalGaussianDistribution:
    """Clips [N, 3, 1 + 4k, H, W] to the distribution of their latents."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(video)))


def decode_clips(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents to clips, not clamped."""
    return vae.decoder(vae.post_quant_conv(latents))


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Unit gain, almost an image VAE in every frame, and little noise on the latents: with PyTorch's defaults the first
    thousand steps learn nothing but the background.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            causal = module.weight.ndim == 5 and module.weight.shape[2] == 3
            into = module.weight[0, :, 0] if causal else module.weight[0]
            module.weight.normal_(0, into.numel() ** -0.5)
            module.bias.zero_()
            if causal:
                module.weight[:, :, :2] *= 0.1
    vae.decoder.conv_out.weight *= 0.3
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -6


def train_vae(job: Job) -> AutoencoderKLWan | None:
    """The VAE: single images, then whole clips, both through a window, then clips in full.

    Crops of a few frames leave later frames to drift.
    """
    torch.manual_seed(job.seed)
    vae = AutoencoderKLWan(**VAE)
    initialise(vae)
    over_whole_clips(vae.to(job.device))
    loop = Loop(job.run / "vae.pt", dict(vae.named_parameters()), job.steps, 1e-3, job.deadline)

    def loss_of(step: int) -> torch.Tensor:
        random = random_of(job.seed, "vae", step)
        images = step < 0.3 * job.steps
        size = SIZE // 2 if step < 0.985 * job.steps else SIZE
        _, video = clips_of(random, 4 * job.batch if images else job.batch, job.device, size)
        if images:
            at = int(random.integers(FRAMES))
            video = video[:, :, at : at + 1]
        torch.manual_seed(int(random.integers(2**62)))
        posterior = encode_clips(vae, video)
        error = decode_clips(vae, posterior.sample()) - video
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + (error**2).mean() + KL_WEIGHT * kl

    if not loop.run(loss_of, job.run / "log.jsonl"):
        return None
    return round_to_half(vae.eval().requires_grad_(False))


def load_vae(folder: Path, device: str) -> AutoencoderKLWan:
    """A VAE that was trained before."""
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    return over_whole_clips(vae.eval().requires_grad_(False)).to(device)


def round_to_half(module: Any) -> Any:
    """The module with its parameters rounded as they are stored."""
    for p in module.parameters():
        p.data = p.data.half().float()
    return module
