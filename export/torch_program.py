"""From a graph's module to a `torch.export` program: traced without values, its weights mapped from a file afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from ..targets.forms import Placement, TensorSpec
from .layers import TORCH_DTYPES, Source

__all__ = ["map_weights", "trace"]


def trace(module: nn.Module, inputs: Sequence[TensorSpec]) -> ExportedProgram:
    """Trace a graph's module with fixed inputs; its parameters become fake, no value is read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for path, parameter in list(module.named_parameters()):
            owner, _, leaf = path.rpartition(".")
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(fake, requires_grad=False)
        arguments = tuple(torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in inputs)
        return torch.export.export(module.eval(), arguments, strict=False)


def map_weights(
    program: ExportedProgram, sources: Mapping[str, Source], places: Mapping[Source, Placement], file: Path
) -> None:
    """Give a program its weights: tensors that are read from the file when they are used."""
    for name, source in sources.items():
        place = places[source]
        stored = np.dtype(np.uint16 if place.dtype == "bfloat16" else place.dtype)
        values = np.memmap(file, stored, "c", place.offset, place.shape)
        program.state_dict[name] = nn.Parameter(torch.from_numpy(values), requires_grad=False)
