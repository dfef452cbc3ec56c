"""From a graph's module to a `torch.export` program: traced without values, its weights mapped from a file after."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from ...runtime.bundle.graphs import TensorSpec
from ...runtime.dtypes import DTYPES
from ...targets.forms import Placement
from ...targets.tracing import lean_tracing
from ..weights.source import Source
from ..weights.steps import TORCH_DTYPES

__all__ = ["export_program", "map_weights"]


def export_program(
    module: nn.Module, inputs: Sequence[TensorSpec], symbols: Mapping[str, Mapping[int, Any]] | None = None
) -> ExportedProgram:
    """Trace a graph's module; no value is read, and the module is left as it was.

    Args:
        module: a module whose parameters have sources.
        inputs: what it takes: the fixed shapes, or the largest ones.
        symbols: `torch.export.Dim` of the axes that vary, by input.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _fake_parameters(module), lean_tracing():
        arguments = tuple(torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in inputs)
        axes = tuple((symbols or {}).get(spec.name) for spec in inputs)
        return torch.export.export(module.eval(), arguments, dynamic_shapes=axes if symbols else None, strict=False)


@contextmanager
def _fake_parameters(module: nn.Module) -> Iterator[None]:
    """While it lasts, parameters are fake tensors of the mode that is on."""
    own = dict(module.named_parameters())
    try:
        for path, parameter in own.items():
            _put(module, path, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False))
        yield
    finally:
        for path, parameter in own.items():
            _put(module, path, parameter)


def _put(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def map_weights(
    program: ExportedProgram, sources: Mapping[str, Source], places: Mapping[Source, Placement], file: Path
) -> None:
    """Give a program its weights: tensors that are read from the file when they are used."""
    for name, source in sources.items():
        place = places[source]
        values = np.memmap(file, DTYPES[place.dtype].storage, "c", place.offset, place.shape)
        tensor = torch.from_numpy(values).view(TORCH_DTYPES[place.dtype])
        program.state_dict[name] = nn.Parameter(tensor, requires_grad=False)
