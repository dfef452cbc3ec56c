"""Numbers that a layer is rounded by, chosen on its statistics: a migration of outliers, and scales of blocks.

Nothing is run: the error of a product is predicted from the mean squares of its input's channels, as if these were
independent of each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.choices import Choice
from ..runtime.quantisation import Scheme
from ..runtime.ranges import Floats, Ranges, integer_range, output_of
from .rounding import block_scales, rounded_weight

__all__ = ["STRENGTHS", "choose_numbers", "convolution_numbers", "migration_vector"]

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Exponents that are tried."""

WORTH = 0.5
"""A migration is taken where it leaves at most so much of the error that is predicted.

It brings all channels near their extremes, so that what prompts beyond the recipe's go past is cut in all of them: on
the demonstration, migrations that were to leave 0.6 to 0.9 of it gained nothing in videos (docs/quantisation.md).
"""

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""What scales of blocks are multiplied by: a smaller step for most values, the largest ones being cut."""


@dataclass(frozen=True)
class _Layer:
    """A layer, and what its input was: the same for all layers of a group."""

    weight: torch.Tensor
    ranges: Ranges
    scheme: Scheme

    @property
    def square(self) -> torch.Tensor:
        """Mean x² [stages, in]."""
        return torch.from_numpy(self.ranges.square)

    @property
    def signal(self) -> torch.Tensor:
        """Mean square of its product by stage [stages], summed over its outputs."""
        return self.square @ self.weight.square().sum(dim=0)

    def scales(self, divisor: torch.Tensor) -> torch.Tensor | None:
        """Scales [out · blocks] of its weight's blocks that lose the least on its input; None: it has no blocks."""
        return _searched_scales(self.weight * divisor, self.square / divisor.square(), self.scheme)

    def error(self, divisor: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Mean square of its product's error by stage [stages], summed over its outputs."""
        weight = self.weight * divisor
        rounded = rounded_weight(weight, self.scheme, scales)
        lost = (self.square / divisor.square()) @ (rounded - weight).square().sum(dim=0)
        if not self.scheme.activations:
            return lost
        interval = torch.from_numpy(self.ranges.interval(divisor.numpy()))
        step = (interval[:, 1] - interval[:, 0]) / 255
        return lost + step.square() / 12 * rounded.square().sum()


def choose_numbers(
    weights: Mapping[str, torch.Tensor], ranges: Ranges, scheme: Scheme, method: str, *, migrates: bool
) -> dict[str, Choice]:
    """Choices of layers that share an input, before any of them is kept.

    Args:
        weights: of each [out, in], in float32.
        ranges: of their input.
        scheme: as its target stores it.
        method: its name.
        migrates: whether their input can be divided where it is made.
    """
    layers = {name: _Layer(weight, ranges, scheme) for name, weight in weights.items()}
    plain = torch.ones(ranges.width)
    tried = {0.0: plain}
    if migrates:
        tried |= {a: migration_vector(list(weights.values()), ranges, scheme, a) for a in STRENGTHS}
    errors = {strength: _relative(list(layers.values()), divisor) for strength, divisor in tried.items()}
    best = min(errors, key=lambda strength: errors[strength])
    strength = best if errors[best] <= WORTH * errors[0.0] else 0.0
    divisor, found = tried[strength], {}
    for name, layer in layers.items():
        scales = layer.scales(divisor)
        rounded, chosen = (_root(layer.error(*how), layer.signal) for how in ((plain, None), (divisor, scales)))
        tensors = _tensors(ranges, scheme, divisor.numpy() if strength else None, scales)
        found[name] = Choice(method, "", strength, {"rounded": rounded, "chosen": chosen}, (), tensors)
    return found


def convolution_numbers(
    name: str, weight: torch.Tensor, ranges: Mapping[str, Ranges], scheme: Scheme, method: str
) -> dict[str, Choice]:
    """Choices of a convolution [out, in, …] and of its output, by the ranges of both.

    The error that is predicted is that of its input and its weight.
    """
    rounded = rounded_weight(weight.flatten(1), scheme).view(weight.shape)
    by_input = weight.transpose(0, 1).flatten(1), rounded.transpose(0, 1).flatten(1)  # [in, out · kernel]
    layer = _Layer(by_input[0].T, ranges[name], scheme)
    step = torch.from_numpy(ranges[name].interval()).diff(dim=1)[:, 0] / 255
    lost = layer.square @ (by_input[1] - by_input[0]).square().sum(dim=1) + step.square() / 12 * rounded.square().sum()
    error = _root(lost, layer.signal)
    found = {
        name: Choice(
            method, "", 0.0, {"rounded": error, "chosen": error}, (), _tensors(ranges[name], scheme, None, None)
        )
    }
    output = output_of(name)
    return found | {output: Choice(method, "", 0.0, {}, (), _tensors(ranges[output], scheme, None, None))}


def migration_vector(weights: Sequence[torch.Tensor], ranges: Ranges, scheme: Scheme, strength: float) -> torch.Tensor:
    """What the input of some layers is divided by [in], their geometric mean being 1.

    Where activations are rounded, s_j = max|x_j|^α / max|W_j|^(1-α) (SmoothQuant, arXiv 2211.10438, eq. 4); else the
    root mean square of x_j to the power of α (after AWQ, arXiv 2306.00978, eq. 5). Both over all stages.
    """
    magnitude = torch.from_numpy(ranges.channels.max(axis=(0, 1)))
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    used = (magnitude > 0) & (largest > 0)
    if scheme.activations:
        vector = magnitude.pow(strength) / largest.pow(1 - strength)
    else:
        vector = torch.from_numpy(ranges.square.mean(axis=0)).sqrt().pow(strength)
    used &= (vector > 0) & torch.isfinite(vector)
    logarithm = torch.where(used, vector, 1.0).log()
    mean = logarithm.sum() / used.sum().clamp(min=1)
    return torch.where(used, (logarithm - mean).exp(), 1.0)


def _relative(layers: Sequence[_Layer], divisor: torch.Tensor) -> float:
    """Relative L2 of the products of some layers together, root mean square over stages."""
    error = torch.stack([layer.error(divisor, None) for layer in layers]).sum(dim=0)
    return _root(error, torch.stack([layer.signal for layer in layers]).sum(dim=0))


def _root(error: torch.Tensor, signal: torch.Tensor) -> float:
    return float((error / signal.clamp(min=torch.finfo(torch.float32).tiny)).mean().sqrt())


def _searched_scales(weight: torch.Tensor, square: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
    if not scheme.block:
        return None
    first = block_scales(weight, scheme)
    blocks, width = -(-weight.shape[1] // scheme.block), weight.shape[1]
    # Stages count alike: each one's squares by their own mean.
    importance = (square / square.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).sum(dim=0)
    best, least = first.clone(), torch.full((len(first),), torch.inf)
    for factor in FACTORS:
        lost = (rounded_weight(weight, scheme, first * factor) - weight).square() * importance
        padded = torch.nn.functional.pad(lost, (0, blocks * scheme.block - width))
        error = padded.view(-1, scheme.block).sum(dim=1)
        better = error < least
        best, least = torch.where(better, first * factor, best), torch.where(better, error, least)
    return best


def _tensors(
    ranges: Ranges, scheme: Scheme, migration: Floats | None, scales: torch.Tensor | None
) -> dict[str, Floats]:
    tensors: dict[str, Floats] = {}
    if scheme.activations == "static":
        tensors["scale"], tensors["zero"] = integer_range(ranges.interval(migration))
    if migration is not None:
        tensors["migration"] = np.ascontiguousarray(migration)
    if scales is not None:
        tensors["blocks"] = scales.numpy()
    return tensors
