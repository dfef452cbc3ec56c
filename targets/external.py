"""Weights of an ONNX model as references into another file."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..runtime.dtypes import DTYPES
from .forms import Placement

__all__ = ["refer"]


def refer(model: ir.Model, placements: Mapping[str, Placement], weights: Path) -> None:
    """Make every placed initializer external data of a file beside the model."""
    for name, place in placements.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            weights.name,
            place.offset,
            place.nbytes,
            ir.DataType[DTYPES[place.dtype].onnx.upper()],
            shape=ir.Shape(place.shape),
            name=name,
            base_dir=weights.parent,
        )
