"""The PyTorch reference: diffusers' own modules in the engine's place of the runtime's chain."""

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray

from ...runtime.model.checkpoint import Checkpoint
from ..families.wan.modules import (
    StageTransformer,
    check_parts,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)

__all__ = ["Reference"]


class Reference:
    """A checkpoint in PyTorch, float32: a denoiser, a text encoder and a decoder. Parts are loaded when first used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check the parts' tensors.

        Raises:
            UsageError: a tensor of the VAE or the text encoder is missing, extra or misshaped.
        """
        check_parts(checkpoint)
        self.checkpoint = checkpoint
        self._stages: list[StageTransformer] | None = None
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings [prompts, text length, text width], by diffusers' `WanPipeline.encode_prompt`."""
        pipeline = WanPipeline(
            tokenizer=load_tokenizer(self.checkpoint),
            text_encoder=load_text_encoder(self.checkpoint),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=None,
        )
        # One prompt at a time: a batch pads differently inside the attention of some CPU kernels.
        embeds = [
            pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=self.checkpoint.model.text_length,
                device=torch.device("cpu"),
            )[0]
            for prompt in prompts
        ]
        return torch.cat(embeds).float().numpy()

    @torch.no_grad()
    def velocity(
        self, stage: int, latent: NDArray[np.float32], timestep: float, text: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `runtime.sampler.Denoiser`."""
        if self._stages is None:
            self._stages = load_transformer(self.checkpoint)
        velocity: torch.Tensor = self._stages[stage](
            torch.from_numpy(latent)[None],
            torch.tensor([timestep], dtype=torch.float32),
            torch.from_numpy(text)[None],
        )
        return velocity[0].numpy()

    def decode(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Frames [T, H, W, 3] of a latent [C, T, H, W], by diffusers' VAE and post-processing."""
        video = torch.from_numpy(self.decode_float(latent)).transpose(0, 1)[None]
        frames = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
        return np.asarray((frames * 255).round(), np.uint8)

    @torch.no_grad()
    def decode_float(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames [T, 3, H, W] in -1 … 1 of a latent [C, T, H, W], by diffusers' VAE."""
        if self._vae is None:
            self._vae = load_vae(self.checkpoint)
        config = self._vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        video = self._vae.decode(torch.from_numpy(latent)[None] / inverse_std + mean, return_dict=False)[0]
        return np.ascontiguousarray(video[0].transpose(0, 1).numpy())
