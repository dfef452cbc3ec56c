"""An ONNX graph to a file of a bundle: the weights become references into the weights file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from ...runtime.manifest import WEIGHTS_FILE
from ..forms import OnnxForm

__all__ = ["write_graph"]

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
}


def write_graph(name: str, forms: Sequence[OnnxForm], folder: Path) -> Iterator[str]:
    """Write `NAME.onnx`; every weight becomes external data of `weights.bin`."""
    (form,) = forms
    for weight, place in form.placements.items():
        value = form.model.graph.initializers[weight]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset,
            place.nbytes,
            _DTYPES[place.dtype],
            shape=ir.Shape(place.shape),
            name=weight,
            base_dir=folder,
        )
    ir.save(form.model, folder / f"{name}.onnx")
    yield ""
