"""An ONNX graph to a file of a bundle: the weights become references into the weights file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from ..external import refer
from ..forms import Lowering, OnnxForm
from .memory import peak_bytes

__all__ = ["write_graph"]


def write_graph(name: str, forms: Sequence[OnnxForm], folder: Path) -> Iterator[Lowering]:
    """Write `NAME.onnx`; every weight becomes external data of the bundle's weights file."""
    (form,) = forms
    memory = peak_bytes(form.model)
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, folder / f"{name}.onnx")
    yield Lowering(memory=memory)
