"""Helios' PyTorch half; see `families.FamilyModules`. Its text encoder and VAE are Wan2.1's."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import HeliosPyramidPipeline
from numpy.typing import NDArray
from torch import nn

from ....runtime.chain.plan import StepPlan
from ....runtime.chain.pyramid import Stage
from ....runtime.chain.sampler import Step
from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.families.helios import HeliosConfig
from ....runtime.quantisation import Recipe
from ....targets.dialect import Dialect
from ..layers import WeightSpace
from ..wan.family import WanModules
from ..wan.modules import load_text_encoder, load_tokenizer
from .modules import load_transformer
from .pipeline import follows_pipeline, run_pipeline
from .transformer import HeliosGraph

__all__ = ["HELIOS_MODULES", "HeliosModules"]


class HeliosModules(WanModules):
    """Helios' half in PyTorch."""

    def stage_graph(
        self, checkpoint: Checkpoint, component: str, stage: Stage, recipe: Recipe, dialect: Dialect
    ) -> tuple[nn.Module, Sequence[nn.Module]]:
        """The transformer of a stage, and its blocks."""
        config = checkpoint.model.transformer
        assert isinstance(config, HeliosConfig)
        module = HeliosGraph(WeightSpace(component, checkpoint.components[component], recipe, dialect), config, stage)
        return module, tuple(module.blocks)

    def load_transformer(self, checkpoint: Checkpoint, expert: int = 0) -> Sequence[nn.Module]:
        """Diffusers' transformer."""
        return load_transformer(checkpoint)

    def encode(self, checkpoint: Checkpoint, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings, made by `HeliosPyramidPipeline.encode_prompt`."""
        tokenizer, encoder = load_tokenizer(checkpoint), load_text_encoder(checkpoint)
        pipeline = HeliosPyramidPipeline(tokenizer, encoder, None, None, None)
        how = {"do_classifier_free_guidance": False, "device": torch.device("cpu")}
        length = checkpoint.model.text_length
        embeds = [pipeline.encode_prompt(prompt, max_sequence_length=length, **how)[0] for prompt in prompts]
        return torch.cat(embeds).float().numpy()

    def follows_pipeline(self, checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
        """Whether diffusers' `HeliosPyramidPipeline` with the folder's scheduler takes these steps."""
        return follows_pipeline(checkpoint, steps)

    def run_pipeline(
        self,
        checkpoint: Checkpoint,
        experts: Sequence[nn.Module],
        steps: Sequence[StepPlan],
        seed: int,
        text: NDArray[np.float32],
        negative: NDArray[np.float32],
        keep: Callable[[Step], None],
    ) -> NDArray[np.float32]:
        """By diffusers' `HeliosPyramidPipeline`."""
        return run_pipeline(checkpoint, experts[0].transformer, steps, seed, text, negative, keep)


HELIOS_MODULES = HeliosModules()
