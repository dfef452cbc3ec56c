"""The PyTorch modules of a Helios checkpoint: diffusers' own class with the checkpoint's weights."""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import HeliosTransformer3DModel
from torch import nn

from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.families.helios import LONG, MID, RECENT, SHORT
from ..wan.modules import filled, read_values, transformer_config

__all__ = ["HeliosStage", "load_transformer"]


class HeliosStage(nn.Module):
    """The transformer of any stage.

    Takes a latent [1, C, T, H, W], a timestep [1], text [1, L, D] and a history [1, C, 20, h, w]; returns the velocity,
    shaped as the latent.
    """

    def __init__(self, transformer: HeliosTransformer3DModel) -> None:
        """Wrap a `HeliosTransformer3DModel`."""
        super().__init__()
        self.transformer: Any = transformer

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, history: torch.Tensor
    ) -> torch.Tensor:
        """The velocity; frames are numbered as `HeliosPyramidPipeline` numbers them."""
        how = {"indices_hidden_states": torch.arange(RECENT.frames, RECENT.frames + latent.shape[2])[None]}
        for name, part in (("short", SHORT), ("mid", MID), ("long", LONG)):
            frames = torch.tensor(part.frames)
            how |= {f"indices_latents_history_{name}": frames[None], f"latents_history_{name}": history[:, :, frames]}
        velocity: torch.Tensor = self.transformer(latent, timestep.long(), text, **how, return_dict=False)[0]
        return velocity


def load_transformer(checkpoint: Checkpoint) -> list[HeliosStage]:
    """One module for all stages, in float32."""
    with init_empty_weights(include_buffers=False):
        module = HeliosTransformer3DModel.from_config(transformer_config(checkpoint))
    stage = HeliosStage(filled(module, read_values(checkpoint.transformer)))
    return [stage] * checkpoint.model.pyramid.depth
