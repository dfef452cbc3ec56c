"""From a graph's module to a `torch.export` program: traced without values, its weights mapped from a file afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from ...targets.forms import Placement, TensorSpec
from ..families.layers import TORCH_DTYPES, Source

__all__ = ["map_weights", "trace"]


def trace(
    module: nn.Module, inputs: Sequence[TensorSpec], symbols: Mapping[str, Mapping[int, Any]] | None = None
) -> ExportedProgram:
    """Trace a graph's module; its parameters become fake, no value is read.

    Args:
        module: whose parameters have sources.
        inputs: of fixed shapes, or of the largest.
        symbols: `torch.export.Dim` of the axes that vary, by input.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        for path, parameter in list(module.named_parameters()):
            owner, _, leaf = path.rpartition(".")
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(fake, requires_grad=False)
        arguments = tuple(torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in inputs)
        axes = tuple((symbols or {}).get(spec.name) for spec in inputs)
        return torch.export.export(module.eval(), arguments, dynamic_shapes=axes if symbols else None, strict=False)


def map_weights(
    program: ExportedProgram, sources: Mapping[str, Source], places: Mapping[Source, Placement], file: Path
) -> None:
    """Give a program its weights: tensors that are read from the file when they are used."""
    for name, source in sources.items():
        place = places[source]
        stored = np.dtype(np.uint16 if place.dtype == "bfloat16" else place.dtype)
        values = np.memmap(file, stored, "c", place.offset, place.shape)
        program.state_dict[name] = nn.Parameter(torch.from_numpy(values), requires_grad=False)
