"""The one table of number types: what files, graphs, NumPy and people call each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPES", "SCALED_DTYPES", "WEIGHT_DTYPES", "Dtype", "dtype_of", "stored_values", "to_float32"]


@dataclass(frozen=True)
class Dtype:
    """A number type."""

    name: str
    """Its name, as NumPy and PyTorch call it and manifests write it."""
    nbytes: int
    safetensors: str
    """Its code in the header of a safetensors file."""
    onnx: str
    """Its name in an ONNX graph: `tensor(…)` of it is a type, its capitals a name of `onnx.TensorProto`."""
    storage: str
    """NumPy's type of the same size that holds its bits."""


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, "F64", "double", "float64"),
        Dtype("float32", 4, "F32", "float", "float32"),
        Dtype("float16", 2, "F16", "float16", "float16"),
        Dtype("bfloat16", 2, "BF16", "bfloat16", "uint16"),
        Dtype("int64", 8, "I64", "int64", "int64"),
        Dtype("int32", 4, "I32", "int32", "int32"),
        Dtype("int16", 2, "I16", "int16", "int16"),
        Dtype("int8", 1, "I8", "int8", "int8"),
        Dtype("uint8", 1, "U8", "uint8", "uint8"),
        Dtype("bool", 1, "BOOL", "bool", "bool"),
        Dtype("float8_e4m3fn", 1, "F8_E4M3", "float8e4m3fn", "uint8"),
        Dtype("float8_e5m2", 1, "F8_E5M2", "float8e5m2", "uint8"),
    )
}
"""Every number type, by its name."""

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
"""What the weights of a checkpoint may be stored in, and a bundle's matrices too."""

SCALED_DTYPES = ("float8_e4m3fn", "float8_e5m2")
"""What weights may be stored in beside a scale, which gives them their values."""

_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values()}


def dtype_of(code: str) -> Dtype:
    """The type that a safetensors header calls by a code.

    Raises:
        KeyError: there is none.
    """
    return _BY_SAFETENSORS[code]


def stored_values(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Values that were read as the storage of a type, as that type; bfloat16, which NumPy lacks, as float32."""
    return to_float32(values) if name == "bfloat16" else values.view(np.dtype(DTYPES[name].storage))


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bits of bfloat16 values as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
