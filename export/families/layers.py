"""Building blocks of the exported graphs: weights that know where they come from, and operators that engines fuse.

A graph's module holds no values. Each parameter is a shape with a `Source`: the checkpoint's tensor and how it is
laid out, so that nothing is transposed when a bundle is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...runtime.model.safetensors import TensorEntry
from .dialects import FUSED, Dialect

__all__ = [
    "QUANTISED",
    "TORCH_DTYPES",
    "Linear",
    "QuantisedLinear",
    "Source",
    "WeightSpace",
    "linear",
    "quantised_product",
    "sources_of",
]


@dataclass(frozen=True)
class Source:
    """Where a graph's parameter comes from."""

    component: str
    tensor: str
    layout: str
    """How the tensor is laid out: "as is"; "transposed": as a matrix [first axis, rest], transposed; "tap k": `[:, :, k]` of a
    convolution; "int8 values" or "int4 values": blocks of a quantised matrix, whose "… scales" are another source.
    """
    shape: tuple[int, ...]
    """In the graph."""
    dtype: str
    """Stored: "float32", "float16", "bfloat16" or "uint8"."""


TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
QUANTISED = {"int8": (8, 128), "int4": (4, 32)}
"""Bits, and values along the input axis that share a scale."""


class WeightSpace:
    """Makes a component's parameters: shapes from the headers, matrices in the bundle's precision, the rest in float32."""

    def __init__(
        self, component: str, tensors: Mapping[str, TensorEntry], precision: str, dialect: Dialect = FUSED
    ) -> None:
        """Parameters of one component of a checkpoint; the precision is a dtype, "int8" or "int4"."""
        self.component, self.tensors, self.precision, self.dialect = component, tensors, precision, dialect

    def vector(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        """A tensor as it is (or reshaped), in float32: biases, norms, modulation tables."""
        return self._make(name, "as is", shape or self.tensors[name].shape, "float32")

    def matrix(self, name: str, *, precise: bool = False) -> nn.Parameter:
        """A weight [out, …] as a matrix, [in, out] or [out, in] as the dialect's engine multiplies without a copy."""
        out, *rest = self.tensors[name].shape
        into = torch.Size(rest).numel()
        precision = "float32" if precise and self.dialect.precise else self.precision
        if self.dialect.transposed:
            return self._make(name, "transposed", (into, out), precision)
        return self._make(name, "as is", (out, into), precision)

    def quantised(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A weight [out, in] as blocks [out, in / block, bytes of a block] and scales [out · in / block]."""
        out, into = self.tensors[name].shape
        bits, block = QUANTISED[self.precision]
        blocks = -(-into // block)
        values = self._make(name, f"{self.precision} values", (out, blocks, block * bits // 8), "uint8")
        return values, self._make(name, f"{self.precision} scales", (out * blocks,), "float32")

    def kernel(self, name: str, tap: int | None = None) -> nn.Parameter:
        """A convolution's kernel [out, in, kh, kw]; one tap of a causal 3-D kernel [out, in, kt, kh, kw]."""
        shape = self.tensors[name].shape
        if tap is None:
            return self._make(name, "as is", shape, self.precision)
        return self._make(name, f"tap {tap}", (*shape[:2], *shape[3:]), self.precision)

    def _make(self, name: str, layout: str, shape: tuple[int, ...], dtype: str) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta"), requires_grad=False)
        parameter.source = Source(self.component, name, layout, tuple(shape), dtype)  # type: ignore[attr-defined]
        return parameter


def sources_of(module: nn.Module) -> dict[str, Source]:
    """Source of every parameter, by its name in the module."""
    return {name: parameter.source for name, parameter in module.named_parameters()}  # type: ignore[attr-defined]


class Linear(nn.Module):
    """A matrix product with a bias."""

    def __init__(self, space: WeightSpace, name: str, *, bias: bool = True, precise: bool = False) -> None:
        """The layer whose tensors are NAME.weight and NAME.bias; see `Dialect.precise`."""
        super().__init__()
        self.product = space.dialect.product
        self.weight = space.matrix(f"{name}.weight", precise=precise)
        self.bias = space.vector(f"{name}.bias") if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        return self.product(x, self.weight, self.bias)


class QuantisedLinear(nn.Module):
    """`x @ weight` without a bias, the weight in blocks of 8 or 4 bits with a scale each, the product in float32."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The layer whose tensor is NAME.weight."""
        super().__init__()
        self.bits, self.block = QUANTISED[space.precision]
        self.into = space.tensors[f"{name}.weight"].shape[1]
        self.values, self.scales = space.quantised(f"{name}.weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        return quantised_product(x, self.values, self.scales, self.bits, self.block)


def linear(space: WeightSpace, name: str) -> nn.Module:
    """A layer without a bias, in the space's precision."""
    return QuantisedLinear(space, name) if space.precision in QUANTISED else Linear(space, name, bias=False)


@torch.library.custom_op("pyrexport::quantised_product", mutates_args=())
def quantised_product(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bits: int, block: int
) -> torch.Tensor:
    """x [..., in] times a matrix in blocks, symmetric around half the range: engines never hold it in float32 as a whole."""
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(2)
    weight = (values.float() - 2 ** (bits - 1)) * scales.view(*values.shape[:2], 1)
    return x @ weight.flatten(1)[:, : x.shape[-1]].T


@quantised_product.register_fake
def _(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])
