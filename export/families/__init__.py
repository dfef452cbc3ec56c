"""The PyTorch half of each family: the modules of its graphs, and its reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...runtime.bundle.graphs import Decoder
from ...runtime.chain.plan import StepPlan
from ...runtime.chain.pyramid import Stage
from ...runtime.chain.sampler import Step
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.description import Model
from ...runtime.model.families import Family
from ...runtime.quantisation import DECODERS, Recipe
from ...targets.dialect import Dialect
from .helios import HELIOS_MODULES
from .tiny_decoder import TINY_MODULES
from .wan import WAN_MODULES

__all__ = ["DecoderModules", "FamilyModules", "decoder_modules", "modules_of"]


class DecoderModules(Protocol):
    """What decodes latents, in PyTorch."""

    def decoder_graph(
        self, checkpoint: Checkpoint, decoder: Decoder, recipe: Recipe, dialect: Dialect, *, first: bool
    ) -> nn.Module:
        """The module of a decoder's graph for the first latent frame, or for a later one."""
        ...

    def load_decoder(self, checkpoint: Checkpoint) -> Any:
        """The reference of the decoder, in float32."""
        ...

    def decode(self, decoder: Any, latent: torch.Tensor) -> torch.Tensor:
        """Video [C, T, H, W] in -1 … 1 of a latent [C, T, H, W], by `load_decoder`'s module."""
        ...


class FamilyModules(DecoderModules, Protocol):
    """What a family adds in PyTorch to its data in `runtime.model.families`; its decoder is its VAE's."""

    def check_components(self, checkpoint: Checkpoint) -> None:
        """Compare the tensors of all components with the classes that hold them.

        Raises:
            UsageError: one is missing, extra or misshaped, or a component is of a variant that is not supported.
        """
        ...

    def stage_graph(
        self, checkpoint: Checkpoint, component: str, stage: Stage, recipe: Recipe, dialect: Dialect
    ) -> tuple[nn.Module, Sequence[nn.Module]]:
        """The module of a stage's graph of one of the checkpoint's transformers, and the layers that are alike."""
        ...

    def text_graph(self, checkpoint: Checkpoint, length: int, recipe: Recipe, dialect: Dialect) -> nn.Module:
        """The module of the text encoder's graph at a length."""
        ...

    def block_matrices(self, checkpoint: Checkpoint, component: str) -> Sequence[str]:
        """Layers of a component's blocks, products with a matrix or convolutions: what can be stored in integers."""
        ...

    def migrations(self, checkpoint: Checkpoint) -> Sequence[tuple[str, ...]]:
        """Layers of the transformer that share an input which a vector can divide at no cost, where it is made."""
        ...

    def block_layers(self, model: Model) -> Sequence[Mapping[str, str]]:
        """Names of the layers of each of the transformer's blocks, in the order in which they run.

        The checkpoint's names, and those that the layers have in the module of `stage_graph`.
        """
        ...

    def decoder_layer(self, model: Model, name: str) -> str:
        """Name in the module of `decoder_graph` of one of the decoder's `block_matrices`."""
        ...

    def latent_statistics(self, checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the latents per channel."""
        ...

    def load_transformer(self, checkpoint: Checkpoint, expert: int = 0) -> Sequence[nn.Module]:
        """The reference of each stage, finest first, in float32, batched.

        Each takes a latent, a timestep, and the conditions of `Denoiser.velocity` by name, and gives a velocity.

        Of a model of several networks, that of one.
        """
        ...

    def blocks(self, stage: nn.Module) -> Sequence[nn.Module]:
        """The blocks of a stage's reference, in order; the first argument of each is the residual stream."""
        ...

    def layer(self, stage: nn.Module, name: str) -> nn.Module:
        """A layer of a stage's reference, by the checkpoint's name of it."""
        ...

    def load_encoder(self, checkpoint: Checkpoint) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """The VAE's encoder: a frame [3, H, W] in -1 … 1 to its latent [C, h, w], as the transformer sees it."""
        ...

    def encode(self, checkpoint: Checkpoint, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings [prompts, text length, text width], as the family's pipeline makes them."""
        ...

    def follows_pipeline(self, checkpoint: Checkpoint, steps: Sequence[StepPlan]) -> bool:
        """Whether a run is one that the checkpoint's own, unmodified pipeline makes."""
        ...

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
        """Sample with that pipeline, from the runtime's noise and embeddings; see `Reference.sample`.

        `experts` are the references of the networks.
        """
        ...

    def token_count(self, checkpoint: Checkpoint, prompt: str) -> int:
        """Tokens of a prompt, its end included, without padding."""
        ...


_MODULES: Mapping[str, FamilyModules] = {
    "wan": WAN_MODULES,
    "wan2.2-ti2v": WAN_MODULES,
    "helios": HELIOS_MODULES,
}


def modules_of(family: Family) -> FamilyModules:
    """The PyTorch half of a family."""
    return _MODULES[family.name]


def decoder_modules(family: Family, component: str) -> DecoderModules:
    """What decodes in PyTorch: a family's VAE, or the tiny decoder, which is the same for all."""
    return TINY_MODULES if component == DECODERS["tiny"] else modules_of(family)
