"""An ONNX graph to a file of a bundle: the weights become references into the weights file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from ...runtime.bundle.engines import Lowering
from ...runtime.bundle.manifest import WEIGHTS_FILE
from ..external import refer
from ..forms import OnnxForm

__all__ = ["write_graph"]


def write_graph(name: str, forms: Sequence[OnnxForm], folder: Path) -> Iterator[Lowering]:
    """Write `NAME.onnx`; every weight becomes external data of `weights.bin`."""
    (form,) = forms
    refer(form.model, form.placements, folder / WEIGHTS_FILE)
    ir.save(form.model, folder / f"{name}.onnx")
    yield Lowering()
