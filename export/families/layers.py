"""Building blocks of the exported graphs: weights that know where they come from.

A graph's module holds no values. Each parameter is a shape with a `Source`: the checkpoint's tensor and the steps that
lay it out, so that nothing is transposed when a bundle is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ...runtime.model.safetensors import TensorEntry
from ...runtime.quantisation import Recipe, Scheme
from ...targets.dialect import Dialect
from ..weights.calibrated import Bounds, Columns, JointScale, Rows, SearchedBlocks
from ..weights.quantising import KernelIntegers, block_step, channel_step
from ..weights.source import Source, empty_parameter
from ..weights.steps import (
    Cast,
    JoinedTaps,
    Matrix,
    Pick,
    Reshape,
    Split,
    Step,
    Tap,
    Transpose,
)

__all__ = [
    "CALIBRATION",
    "Linear",
    "WeightSpace",
    "linear",
    "run_time_zero",
]


CALIBRATION = "calibration"
"""The component whose tensors are a recipe's."""


class WeightSpace:
    """Makes a component's parameters: shapes from the headers, matrices as the recipe says, the rest in float32."""

    def __init__(self, component: str, tensors: Mapping[str, TensorEntry], recipe: Recipe, dialect: Dialect) -> None:
        """Parameters of one component of a checkpoint."""
        self.component, self.tensors, self.recipe, self.dialect = component, tensors, recipe, dialect

    def vector(self, name: str, shape: tuple[int, ...] | None = None, *, feeds: str = "") -> nn.Parameter:
        """A tensor as it is (or reshaped), in float32: biases, norms, modulation tables.

        Where it makes the input of a layer, `feeds`, it is divided by that layer's migration.
        """
        reshaped: tuple[Step, ...] = () if shape is None else (Reshape(shape),)
        return self._make(name, Cast("float32"), *self._divided(feeds), *reshaped)

    def matrix(self, layer: str, *, precise: bool = False, feeds: str = "") -> nn.Parameter:
        """LAYER.weight [out, …] as a matrix, [in, out] or [out, in], as its engine takes it without a copy."""
        dtype = "float32" if precise and self.dialect.precise else self.recipe.scheme(layer).dtype
        turned: tuple[Step, ...] = (Transpose(),) if self.dialect.transposed else ()
        return self._make(f"{layer}.weight", *self._migrated(layer, feeds), Cast(dtype), Matrix(), *turned)

    def pieces(self, layer: str) -> int:
        """Products that LAYER is the sum of, of as many input channels each; see `Dialect.most_inputs`."""
        _, *rest = self.tensors[f"{layer}.weight"].shape
        into, most = math.prod(rest), self.dialect.most_inputs or math.prod(rest)
        return next(count for count in range(-(-into // most), into + 1) if into % count == 0)

    def matrices(self, layer: str, count: int, feeds: str) -> list[nn.Parameter]:
        """LAYER.weight [out, in] in pieces [out, in / count]."""
        steps = *self._migrated(layer, feeds), Cast(self.recipe.scheme(layer).dtype), Matrix(), Split(count)
        return [self._make(f"{layer}.weight", *steps, output=output) for output in range(count)]

    def blocks(self, layer: str, scheme: Scheme, feeds: str) -> tuple[nn.Parameter, nn.Parameter]:
        """LAYER.weight [out, in] as blocks and their scales; see `block_step`."""
        searched = self.recipe.calibrated.get(f"{layer}/blocks")
        made = block_step(self._with_scales(scheme)) if searched is None else SearchedBlocks(scheme, searched)
        return self._pair(layer, made, feeds)

    def integers(self, layer: str, scheme: Scheme, feeds: str) -> tuple[nn.Parameter, nn.Parameter]:
        """LAYER.weight [out, in] as integers, turned as its engine takes them, and scales [out]; see `Channels`."""
        made = channel_step(self._with_scales(scheme), transposed=self.dialect.transposed)
        return self._pair(layer, made, feeds)

    def _with_scales(self, scheme: Scheme) -> Scheme:
        return replace(scheme, scales=self.recipe.default.dtype) if self.dialect.typed_scales else scheme

    def joint_range(self, layer: str, scheme: Scheme) -> nn.Parameter:
        """Scale of a layer's input in all stages, around zero, in the type of other scales."""
        tensors, name = self.recipe.calibrated, f"{layer}/scale"
        steps = (
            JointScale(tensors[f"{layer}/zero"], scheme.largest),
            Cast(self._with_scales(scheme).scales),
        )
        return empty_parameter(Source.of(CALIBRATION, name, tensors[name], steps))

    def input_range(self, layer: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Scale and zero of a layer's input in the stage of the recipe, float32 and uint8."""
        stage, tensors = self.recipe.stage, self.recipe.calibrated
        scale, zero = (f"{layer}/{field}" for field in ("scale", "zero"))
        return (
            empty_parameter(Source.of(CALIBRATION, scale, tensors[scale], (Pick(stage),))),
            empty_parameter(Source.of(CALIBRATION, zero, tensors[zero], (Cast("uint8"), Pick(stage)))),
        )

    def output_bounds(self, layer: str) -> nn.Parameter:
        """What the magnitude of each output channel [out] cannot exceed in the recipe's stage, without the bias."""
        lowest, highest = (self.recipe.calibrated[f"{layer}/{field}"] for field in ("lowest", "highest"))
        return self._make(f"{layer}.weight", Matrix(), Bounds(lowest, highest, self.recipe.stage))

    def migration(self, layer: str) -> nn.Parameter | None:
        """What a layer's input is to be divided by [in], where its recipe says so."""
        entry = self._migration(layer)
        return None if entry is None else empty_parameter(Source.of(CALIBRATION, f"{layer}/migration", entry, ()))

    def _migration(self, layer: str) -> TensorEntry | None:
        found: TensorEntry | None = self.recipe.calibrated.get(f"{layer}/migration")
        return found

    def _divided(self, feeds: str) -> tuple[Step, ...]:
        entry = self._migration(feeds)
        return () if entry is None else (Rows(entry),)

    def _migrated(self, layer: str, feeds: str) -> tuple[Step, ...]:
        """What a weight goes through before it is rounded."""
        entry = self._migration(layer)
        return (() if entry is None else (Columns(entry),)) + self._divided(feeds)

    def _pair(self, layer: str, made: Step, feeds: str) -> tuple[nn.Parameter, nn.Parameter]:
        steps = (*self._migrated(layer, feeds), made)
        values, scales = (self._make(f"{layer}.weight", *steps, output=output) for output in range(2))
        return values, scales

    def kernel(self, layer: str, tap: int | None = None) -> nn.Parameter:
        """LAYER.weight [out, in, kh, kw]; one tap of a causal 3-D kernel [out, in, kt, kh, kw]."""
        cut: tuple[Step, ...] = () if tap is None else (Tap(tap),)
        return self._make(f"{layer}.weight", Cast(self.recipe.scheme(layer).dtype), *cut)

    def integer_kernel(self, layer: str, scheme: Scheme) -> tuple[nn.Parameter, nn.Parameter]:
        """LAYER.weight [out, in, (kt,) kh, kw] as integers [out, kt · in, kh, kw], and scales [out]."""
        steps = JoinedTaps(), KernelIntegers(scheme.largest)
        values, scales = (self._make(f"{layer}.weight", *steps, output=output) for output in range(2))
        return values, scales

    def _make(self, name: str, *steps: Step, output: int = 0) -> nn.Parameter:
        return empty_parameter(Source.of(self.component, name, self.tensors[name], steps, output))


class Linear(nn.Module):
    """A matrix product, with a bias where there is one."""

    def __init__(self, space: WeightSpace, layer: str, *, bias: bool, precise: bool, feeds: str) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias; see `Dialect.precise`."""
        super().__init__()
        self.product = space.dialect.product
        self.weight = space.matrix(layer, precise=precise, feeds=feeds)
        self.bias = space.vector(f"{layer}.bias", feeds=feeds) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        return self.product(x, self.weight, self.bias)


class SplitLinear(nn.Module):
    """A matrix product as the sum of several, of a part of the input channels each."""

    def __init__(self, space: WeightSpace, layer: str, pieces: int, *, bias: bool, feeds: str) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias."""
        super().__init__()
        self.product = space.dialect.product
        self.weights = nn.ParameterList(space.matrices(layer, pieces, feeds))
        self.bias = space.vector(f"{layer}.bias", feeds=feeds) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        width = x.shape[-1] // len(self.weights)
        y = self.product(x[..., :width], self.weights[0], self.bias)
        for index, weight in enumerate(self.weights[1:], 1):
            y = y + self.product(x[..., index * width : (index + 1) * width], weight, None)
        return y


class BlockLinear(nn.Module):
    """A product with a weight in blocks of few bits with a scale each."""

    def __init__(self, space: WeightSpace, layer: str, scheme: Scheme, *, bias: bool, feeds: str) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias."""
        super().__init__()
        self.product, self.scheme = space.dialect.block_product, scheme
        self.values, self.scales = space.blocks(layer, scheme, feeds)
        self.bias = space.vector(f"{layer}.bias", feeds=feeds) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        return self.product(x, self.values, self.scales, self.bias, self.scheme)


class IntegerLinear(nn.Module):
    """A product of 8-bit integers: its input is rounded as well as its weight, by a scale of its own or a recipe's."""

    def __init__(self, space: WeightSpace, layer: str, scheme: Scheme, *, bias: bool, feeds: str) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias."""
        super().__init__()
        self.product = space.dialect.integer_product
        self.values, self.scales = space.integers(layer, scheme, feeds)
        self.bias = space.vector(f"{layer}.bias", feeds=feeds) if bias else None
        self.scale: nn.Parameter | None = None
        self.zero: nn.Parameter | None = None
        if scheme.activations == "static" and space.dialect.symmetric:
            self.scale = space.joint_range(layer, scheme)
        elif scheme.activations == "static":
            self.scale, self.zero = space.input_range(layer)
        self.bound = space.output_bounds(layer) if space.dialect.bounded else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        return self.product(x, self.values, self.scales, self.bias, self.scale, self.zero, self.bound)


def linear(space: WeightSpace, layer: str, *, bias: bool = True, precise: bool = False, feeds: str = "") -> nn.Module:
    """A layer as the recipe says; `feeds` names the layer whose input its output becomes, divided by its migration."""
    scheme = space.recipe.scheme(layer)
    pieces = space.pieces(layer)
    if scheme.is_float and pieces > 1:
        return SplitLinear(space, layer, pieces, bias=bias, feeds=feeds)
    if scheme.is_float:
        return Linear(space, layer, bias=bias, precise=precise, feeds=feeds)
    made = BlockLinear if scheme.block else IntegerLinear
    return made(space, layer, scheme, bias=bias, feeds=feeds)


def run_time_zero(x: torch.Tensor) -> torch.Tensor:
    """A zero that is known only in a run: what it is added to is then made in the run, and not stored by a compiler."""
    return 0.0 * x
