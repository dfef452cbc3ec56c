"""Wan2.1's PyTorch half; see `families.FamilyModules`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from numpy.typing import NDArray
from torch import nn

from ....runtime.bundle.graphs import Decoder
from ....runtime.chain.noise import generator
from ....runtime.chain.plan import StepPlan
from ....runtime.chain.pyramid import Stage
from ....runtime.chain.sampler import Step, initial_latent
from ....runtime.model.checkpoint import Checkpoint
from ....runtime.model.description import Model
from ....runtime.model.families.wan import WanConfig
from ....runtime.model.families.wan_decoder import WanDecoderConfig
from ....runtime.quantisation import Recipe
from ....targets.dialect import Dialect
from ..frames import PackedCaches
from ..layers import WeightSpace
from .modules import (
    check_components,
    empty_modules,
    load_encoder,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from .pipeline import follows_pipeline, run_pipeline
from .text import TextGraph, check_supported
from .transformer import StageGraph
from .vae import VaeGraph, decoder_layer

__all__ = ["WAN_MODULES", "WanModules"]

ATTENTION_LAYERS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
BLOCK_LAYERS = {
    **{f"attn{n}.{theirs}": f"attn{n}.{ours}" for n in (1, 2) for theirs, ours in ATTENTION_LAYERS.items()},
    "ffn.net.0.proj": "ffn_in",
    "ffn.net.2": "ffn_out",
}
"""Layers of a block in the order in which they run: the checkpoint's names, and those of `transformer.Block`."""

BLOCK_WEIGHTS: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "transformer": (("blocks.",), (2,)),
    "text_encoder": (("encoder.block.",), (2,)),
    "vae": (("decoder.mid_block.", "decoder.up_blocks."), (4, 5)),
}
"""By component: where the weights of its blocks are, and their numbers of axes."""


class WanModules:
    """Wan2.1's half in PyTorch."""

    def check_components(self, checkpoint: Checkpoint) -> None:
        """Compare the tensors with diffusers' and transformers' own classes."""
        check_components(checkpoint)
        check_supported(checkpoint.text_encoder_config)

    def stage_graph(
        self, checkpoint: Checkpoint, component: str, stage: Stage, recipe: Recipe, dialect: Dialect
    ) -> tuple[nn.Module, Sequence[nn.Module]]:
        """The transformer of a stage, and its blocks."""
        space = WeightSpace(component, checkpoint.components[component], recipe, dialect)
        config = checkpoint.model.transformer
        assert isinstance(config, WanConfig)
        module = StageGraph(space, config, checkpoint.model.pyramid.kind, stage)
        return module, tuple(module.blocks)

    def text_graph(self, checkpoint: Checkpoint, length: int, recipe: Recipe, dialect: Dialect) -> nn.Module:
        """UMT5's encoder."""
        assert checkpoint.text_encoder_config is not None
        space = WeightSpace("text_encoder", checkpoint.text_encoder, recipe, dialect)
        return TextGraph(space, checkpoint.text_encoder_config, length)

    def decoder_graph(
        self, checkpoint: Checkpoint, decoder: Decoder, recipe: Recipe, dialect: Dialect, *, first: bool
    ) -> nn.Module:
        """The VAE's decoder, its caches apart or packed."""
        config = checkpoint.model.decoders[decoder.component]
        assert isinstance(config, WanDecoderConfig)
        space = WeightSpace("vae", checkpoint.vae, recipe, dialect)
        graph = VaeGraph(space, config, decoder.caches, first=first)
        return PackedCaches(graph, config.cache_shapes(*decoder.tiles.tile)) if decoder.packed else graph

    def block_matrices(self, checkpoint: Checkpoint, component: str) -> Sequence[str]:
        """The matrices of the transformer's and of UMT5's blocks, and the decoder's convolutions between its ends.

        A table of position biases is none.
        """
        blocks, axes = BLOCK_WEIGHTS[component]
        return [
            name.removesuffix(".weight")
            for name, entry in checkpoint.components[component].items()
            if name.startswith(blocks)
            and name.endswith(".weight")
            and len(entry.shape) in axes
            and "relative_attention_bias" not in name
        ]

    def migrations(self, checkpoint: Checkpoint) -> Sequence[tuple[str, ...]]:
        """Inputs that a modulation, an affine norm or the values of an attention make; not those of a GELU or text."""
        config, found = checkpoint.model.transformer, list[tuple[str, ...]]()
        assert isinstance(config, WanConfig)
        for name in (f"blocks.{index}" for index in range(config.num_layers)):
            found.append(tuple(f"{name}.attn1.to_{which}" for which in "qkv"))
            found += [(f"{name}.attn2.to_q",)] if config.cross_attn_norm else []
            found += [(f"{name}.{attention}.to_out.0",) for attention in ("attn1", "attn2")]
            found.append((f"{name}.ffn.net.0.proj",))
        return found

    def block_layers(self, model: Model) -> Sequence[Mapping[str, str]]:
        """Those of both attentions and of the feed-forward."""
        return [
            {f"blocks.{index}.{theirs}": f"blocks.{index}.{ours}" for theirs, ours in BLOCK_LAYERS.items()}
            for index in range(model.transformer.num_layers)
        ]

    def decoder_layer(self, model: Model, name: str) -> str:
        """A convolution between the ends of `VaeGraph`."""
        config = model.decoders["vae"]
        assert isinstance(config, WanDecoderConfig)
        return decoder_layer(config, name)

    def latent_statistics(self, checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the latents, 0 and 1 where there is no VAE."""
        channels = checkpoint.model.pyramid.geometry.channels
        if checkpoint.vae_config is None:
            return [0.0] * channels, [1.0] * channels
        config: Any = empty_modules(checkpoint)["vae"].config
        return [float(v) for v in config.latents_mean], [float(v) for v in config.latents_std]

    def load_transformer(self, checkpoint: Checkpoint, expert: int = 0) -> Sequence[nn.Module]:
        """Diffusers' transformer, with what pyramidal and PPF models add to it."""
        return load_transformer(checkpoint, expert)

    def blocks(self, stage: nn.Module) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        blocks: Any = stage.transformer.blocks  # type: ignore[union-attr]
        return tuple(blocks)

    def layer(self, stage: nn.Module, name: str) -> nn.Module:
        """A layer of diffusers' transformer."""
        transformer: Any = stage.transformer
        layer: nn.Module = transformer.get_submodule(name)
        return layer

    def load_encoder(self, checkpoint: Checkpoint) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """Diffusers' VAE without its decoder."""
        return load_encoder(checkpoint)

    def load_decoder(self, checkpoint: Checkpoint) -> Any:
        """Diffusers' VAE."""
        return load_vae(checkpoint)

    def encode(self, checkpoint: Checkpoint, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings, made by diffusers' `WanPipeline.encode_prompt`."""
        pipeline = WanPipeline(
            tokenizer=load_tokenizer(checkpoint),
            text_encoder=load_text_encoder(checkpoint),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=None,
        )
        how = {"do_classifier_free_guidance": False, "device": torch.device("cpu")}
        length = checkpoint.model.text_length
        # One prompt at a time: a batch pads differently inside the attention of some CPU kernels.
        embeds = [pipeline.encode_prompt(prompt, max_sequence_length=length, **how)[0] for prompt in prompts]
        return torch.cat(embeds).float().numpy()

    def decode(self, decoder: Any, latent: torch.Tensor) -> torch.Tensor:
        """Video of a latent, de-normalised and decoded as diffusers' pipeline does."""
        mean = torch.tensor(decoder.config.latents_mean).view(1, -1, 1, 1, 1)
        inverse_std = 1.0 / torch.tensor(decoder.config.latents_std).view(1, -1, 1, 1, 1)
        video: torch.Tensor = decoder.decode(latent[None] / inverse_std + mean, return_dict=False)[0]
        return video[0]

    def follows_pipeline(self, checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
        """Whether diffusers' `WanPipeline` with the folder's scheduler takes these steps."""
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
        """By diffusers' `WanPipeline`."""
        transformers = [expert.transformer for expert in experts]
        latent = initial_latent(steps, generator(seed))
        return run_pipeline(checkpoint, transformers, steps, latent, text, negative, keep)

    def token_count(self, checkpoint: Checkpoint, prompt: str) -> int:
        """Tokens of a prompt, counted by transformers' tokenizer."""
        return len(load_tokenizer(checkpoint)(prompt).input_ids)


WAN_MODULES = WanModules()
