"""The PyTorch reference: the family's own modules in the engine's place of the runtime's chain."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray

from ...runtime.chain.plan import StepPlan
from ...runtime.chain.sampler import Conditions
from ...runtime.model.checkpoint import Checkpoint
from ..families import modules_of

__all__ = ["Reference"]


class Reference:
    """A checkpoint in PyTorch, float32: a denoiser, a text encoder and a decoder, each loaded when it is first used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check the components' tensors.

        Raises:
            UsageError: a tensor of the VAE or the text encoder is missing, extra or misshaped.
        """
        self.checkpoint, self.modules = checkpoint, modules_of(checkpoint.model.family)
        self.modules.check_components(checkpoint)
        self._stages: Sequence[Any] | None = None
        self._decoder: Any = None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings [prompts, text length, text width]."""
        return self.modules.encode(self.checkpoint, prompts)

    @torch.no_grad()
    def velocity(self, step: StepPlan, latent: NDArray[np.float32], conditions: Conditions) -> NDArray[np.float32]:
        """See `runtime.chain.sampler.Denoiser`."""
        if self._stages is None:
            self._stages = self.modules.load_transformer(self.checkpoint)
        velocity: torch.Tensor = self._stages[step.stage.index](
            torch.from_numpy(latent)[None],
            torch.tensor([step.timestep], dtype=torch.float32),
            torch.from_numpy(conditions["text"])[None],
        )
        return velocity[0].numpy()

    def decode(self, latent: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Frames [T, H, W, 3] of a latent [C, T, H, W], by diffusers' post-processing."""
        video = torch.from_numpy(self.decode_float(latent)).transpose(0, 1)[None]
        scale = self.checkpoint.model.pyramid.geometry.spatial
        frames = VideoProcessor(vae_scale_factor=scale).postprocess_video(video, output_type="np")[0]
        return np.asarray((frames * 255).round(), np.uint8)

    @torch.no_grad()
    def decode_float(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames [T, 3, H, W] in -1 … 1 of a latent [C, T, H, W]."""
        if self._decoder is None:
            self._decoder = self.modules.load_decoder(self.checkpoint)
        video = self.modules.decode(self._decoder, torch.from_numpy(latent))
        return np.ascontiguousarray(video.transpose(0, 1).numpy())
