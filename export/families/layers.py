"""Building blocks of the exported graphs: weights that know where they come from.

A graph's module holds no values. Each parameter is a shape with a `Source`: the checkpoint's tensor and the steps that
lay it out, so that nothing is transposed when a bundle is loaded.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ...runtime.model.safetensors import TensorEntry
from ...runtime.quantisation import Recipe, Scheme
from ...targets.dialect import Dialect
from ..weights.source import Source, empty_parameter
from ..weights.steps import Cast, Integers, Matrix, Pick, Quantise, Reshape, Step, Tap, Transpose

__all__ = ["CALIBRATION", "Linear", "WeightSpace", "linear", "run_time_zero"]


CALIBRATION = "calibration"
"""The component whose tensors are a recipe's."""


class WeightSpace:
    """Makes a component's parameters: shapes from the headers, matrices as the recipe says, the rest in float32."""

    def __init__(self, component: str, tensors: Mapping[str, TensorEntry], recipe: Recipe, dialect: Dialect) -> None:
        """Parameters of one component of a checkpoint."""
        self.component, self.tensors, self.recipe, self.dialect = component, tensors, recipe, dialect

    def vector(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        """A tensor as it is (or reshaped), in float32: biases, norms, modulation tables."""
        reshaped: tuple[Step, ...] = () if shape is None else (Reshape(shape),)
        return self._make(name, Cast("float32"), *reshaped)

    def matrix(self, layer: str, *, precise: bool = False) -> nn.Parameter:
        """LAYER.weight [out, …] as a matrix, [in, out] or [out, in], as its engine takes it without a copy."""
        dtype = "float32" if precise and self.dialect.precise else self.recipe.scheme(layer).dtype
        turned: tuple[Step, ...] = (Transpose(),) if self.dialect.transposed else ()
        return self._make(f"{layer}.weight", Cast(dtype), Matrix(), *turned)

    def blocks(self, layer: str, scheme: Scheme) -> tuple[nn.Parameter, nn.Parameter]:
        """LAYER.weight [out, in] as blocks and their scales; see `Quantise`."""
        values, scales = (self._make(f"{layer}.weight", Quantise(scheme), output=output) for output in range(2))
        return values, scales

    def integers(self, layer: str, scheme: Scheme) -> tuple[nn.Parameter, nn.Parameter]:
        """LAYER.weight [out, in] as integers, turned as its engine takes them, and scales [out]; see `Integers`."""
        step = Integers(scheme.largest, self.dialect.transposed)
        values, scales = (self._make(f"{layer}.weight", step, output=output) for output in range(2))
        return values, scales

    def input_range(self, layer: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Scale and zero of a layer's input in the stage of the recipe, float32 and uint8."""
        stage, tensors = self.recipe.stage, self.recipe.calibrated
        scale, zero = (f"{layer}/{field}" for field in ("scale", "zero"))
        return (
            empty_parameter(Source.of(CALIBRATION, scale, tensors[scale], (Pick(stage),))),
            empty_parameter(Source.of(CALIBRATION, zero, tensors[zero], (Cast("uint8"), Pick(stage)))),
        )

    def kernel(self, layer: str, tap: int | None = None) -> nn.Parameter:
        """LAYER.weight [out, in, kh, kw]; one tap of a causal 3-D kernel [out, in, kt, kh, kw]."""
        cut: tuple[Step, ...] = () if tap is None else (Tap(tap),)
        return self._make(f"{layer}.weight", Cast(self.recipe.scheme(layer).dtype), *cut)

    def _make(self, name: str, *steps: Step, output: int = 0) -> nn.Parameter:
        return empty_parameter(Source.of(self.component, name, self.tensors[name], steps, output))


class Linear(nn.Module):
    """A matrix product, with a bias where there is one."""

    def __init__(self, space: WeightSpace, layer: str, *, bias: bool, precise: bool) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias; see `Dialect.precise`."""
        super().__init__()
        self.product = space.dialect.product
        self.weight = space.matrix(layer, precise=precise)
        self.bias = space.vector(f"{layer}.bias") if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        return self.product(x, self.weight, self.bias)


class BlockLinear(nn.Module):
    """A product with a weight in blocks of few bits with a scale each, computed in float32."""

    def __init__(self, space: WeightSpace, layer: str, scheme: Scheme, *, bias: bool) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias."""
        super().__init__()
        self.product, self.scheme = space.dialect.block_product, scheme
        self.values, self.scales = space.blocks(layer, scheme)
        self.bias = space.vector(f"{layer}.bias") if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        y = self.product(x, self.values, self.scales, self.scheme)
        return y if self.bias is None else y + self.bias


class IntegerLinear(nn.Module):
    """A product of 8-bit integers: its input is rounded as well as its weight, by a scale of its own or a recipe's."""

    def __init__(self, space: WeightSpace, layer: str, scheme: Scheme, *, bias: bool) -> None:
        """The layer whose tensors are LAYER.weight and LAYER.bias."""
        super().__init__()
        self.product = space.dialect.integer_product
        self.values, self.scales = space.integers(layer, scheme)
        self.bias = space.vector(f"{layer}.bias") if bias else None
        self.scale: nn.Parameter | None = None
        self.zero: nn.Parameter | None = None
        if scheme.activations == "static":
            self.scale, self.zero = space.input_range(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias: x […, in] to […, out]."""
        return self.product(x, self.values, self.scales, self.bias, self.scale, self.zero)


def linear(space: WeightSpace, layer: str, *, bias: bool = True, precise: bool = False) -> nn.Module:
    """A layer as the recipe says."""
    scheme = space.recipe.scheme(layer)
    if scheme.is_float:
        return Linear(space, layer, bias=bias, precise=precise)
    if scheme.activations:
        return IntegerLinear(space, layer, scheme, bias=bias)
    return BlockLinear(space, layer, scheme, bias=bias)


def run_time_zero(x: torch.Tensor) -> torch.Tensor:
    """A zero that is known only in a run: what it is added to is then made in the run, and not stored by a compiler."""
    return 0.0 * x
