"""Weights of an ONNX model as references into another file."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from .forms import Placement

__all__ = ["refer"]


def refer(model: ir.Model, placements: Mapping[str, Placement], weights: Path) -> None:
    """Make every placed initializer external data of a file beside the model, in the type that it has there."""
    for name, place in placements.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            weights.name,
            place.offset,
            place.nbytes,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=weights.parent,
        )
