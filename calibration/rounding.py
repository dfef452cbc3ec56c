"""What rounding does to a layer, in PyTorch: the same integers as a bundle stores, in the reference's place of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..export.families import modules_of
from ..export.reference.reference import Reference
from ..export.weights.quantising import block_integers, block_step, channel_values
from ..runtime.chain.plan import StepPlan
from ..runtime.chain.sampler import Conditions
from ..runtime.choices import Choice
from ..runtime.quantisation import Scheme
from ..targets.dialect import expand_blocks, rounded_input
from .observe import in_pieces

__all__ = ["RoundedReference", "block_scales", "rounded_weight"]


def rounded_weight(weight: torch.Tensor, scheme: Scheme, scales: torch.Tensor | None = None) -> torch.Tensor:
    """A matrix [out, in] as a scheme stores it, in float32; by scales of its blocks where these are given."""
    if not scheme.block:
        values, channels = channel_values(weight, scheme.largest, scheme.scales, scheme.dtype)
        return values.float() * channels[:, None]
    if scales is None:
        values, scales = block_step(scheme).apply(weight, 0)
    else:
        values = block_integers(weight, scales, scheme)
    return expand_blocks(values, scales, scheme.bits, signed=scheme.signed)[:, : weight.shape[1]]


def block_scales(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales [out · blocks] of a matrix's blocks by rounding alone."""
    return block_step(scheme).apply(weight, 0)[1]


@dataclass
class RoundedReference:
    """A denoiser: the reference, while some of its layers compute as they are stored."""

    reference: Reference
    stage: int = 0

    def velocity(self, step: StepPlan, latent: NDArray[np.float32], conditions: Conditions) -> NDArray[np.float32]:
        """See `runtime.chain.sampler.Denoiser`."""
        self.stage = step.stage.index
        return self.reference.velocity(step, latent, conditions)

    @contextmanager
    def rounded(self, choices: Mapping[str, Choice], schemes: Mapping[str, Scheme]) -> Iterator[None]:
        """Meanwhile, layers are rounded as their choices say.

        Args:
            choices: by layer; those that are kept, and layers without one, stay as they are.
            schemes: by name, as their target stores them.
        """
        family = modules_of(self.reference.checkpoint.model.family)
        with ExitStack() as undone:
            for stage in dict.fromkeys(self.reference.stages):
                names = {module: name.removeprefix("transformer.") for name, module in stage.named_modules()}
                for block in family.blocks(stage):
                    undone.enter_context(in_pieces(block, lambda _: None))
                    layers: list[Any] = [each for each in block.modules() if isinstance(each, nn.Linear)]
                    for layer in layers:
                        choice = choices.get(names[layer])
                        if choice is not None and choice.scheme:
                            layer.forward = partial(_product, layer, choice, schemes[choice.scheme], lambda: self.stage)
                            undone.callback(delattr, layer, "forward")
            yield


def _product(
    layer: nn.Linear, choice: Choice, scheme: Scheme, stage: Callable[[], int], x: torch.Tensor
) -> torch.Tensor:
    """The product of a rounded layer: its weight is made anew each time, so that none is held twice."""
    numbers = {name: torch.from_numpy(array) for name, array in choice.tensors.items()}
    weight, migration = layer.weight.detach(), numbers.get("migration")
    if migration is not None:
        weight, x = weight * migration, x / migration
    if scheme.activations == "static":
        x = rounded_input(x, numbers["scale"][stage()], numbers["zero"][stage()])
    elif scheme.activations:
        x = rounded_input(x)
    return nn.functional.linear(x, rounded_weight(weight, scheme, numbers.get("blocks")), layer.bias)
