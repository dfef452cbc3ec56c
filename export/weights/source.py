"""Where a graph's parameter comes from: a tensor of the checkpoint, and the steps that make the parameter of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ...runtime.model.safetensors import TensorEntry
from .steps import TORCH_DTYPES, Step, Stored

__all__ = ["Source", "empty_parameter", "sources_of"]


@dataclass(frozen=True)
class Source:
    """A parameter's origin. Equal sources are stored once."""

    component: str
    tensor: str
    """The tensor's name, as diffusers calls it."""
    given: Stored
    """The tensor as it is read; see `edits`."""
    steps: tuple[Step, ...] = ()
    output: int = 0
    """Which of the tensors that the last step gives it is."""

    @classmethod
    def of(cls, component: str, name: str, entry: TensorEntry, steps: tuple[Step, ...], output: int = 0) -> "Source":
        """The source of a tensor of a checkpoint."""
        return cls(component, name, Stored(entry.shape, entry.values), steps, output)

    @cached_property
    def stored(self) -> Stored:
        """The parameter, as the bundle stores it."""
        made: tuple[Stored, ...] = (self.given,)
        for step in self.steps:
            made = step.shape(made[0])
        return made[self.output]


def empty_parameter(source: Source) -> nn.Parameter:
    """A parameter without values that knows its source."""
    stored = source.stored
    empty = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device="meta")
    parameter = nn.Parameter(empty, requires_grad=False)
    parameter.source = source  # type: ignore[attr-defined]
    return parameter


def sources_of(module: nn.Module) -> Mapping[str, Source]:
    """Source of every parameter, by its name in the module."""
    return {name: parameter.source for name, parameter in module.named_parameters()}  # type: ignore[attr-defined]
