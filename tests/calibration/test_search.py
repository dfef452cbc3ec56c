"""Numbers that are chosen on statistics, against what rounding really does to random layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pyrexport.calibration.rounding import block_scales, rounded_weight
from pyrexport.calibration.search import STRENGTHS, choose_numbers, migration_vector
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import Ranges
from pyrexport.targets.dialect import rounded_input

W8A8, W4 = SCHEMES["w8a8"], SCHEMES["w4"]


def layer(outliers: float, width: int = 96) -> tuple[torch.Tensor, torch.Tensor, Ranges]:
    """A weight, inputs with a few channels that stand out, and their statistics, of one stage."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4096, width, generator=draw)
    x[:, :3] *= outliers
    weight = torch.randn(64, width, generator=draw) / width**0.5
    lowest, highest = x.amin(dim=0).view(1, 1, -1).numpy(), x.amax(dim=0).view(1, 1, -1).numpy()
    magnitude = np.maximum(-lowest, highest).max(axis=(1, 2))
    square = x.square().mean(dim=0, keepdim=True).numpy()
    return weight, x, Ranges(lowest, highest, square, magnitude, magnitude[None], magnitude)


def measured(weight: torch.Tensor, x: torch.Tensor, choice) -> float:
    """Relative L2 of the product with inputs and weight rounded as a choice says."""
    numbers = {name: torch.from_numpy(array) for name, array in choice.tensors.items()}
    divisor = numbers.get("migration", torch.ones(x.shape[1]))
    given, scheme = x / divisor, SCHEMES[choice.scheme]
    if scheme.activations:
        given = rounded_input(given, numbers["scale"][0], numbers["zero"][0])
    found = given @ rounded_weight(weight * divisor, scheme, numbers.get("blocks")).T
    exact = x.double() @ weight.double().T
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("outliers", [1, 30])
def test_the_predicted_error_is_the_measured_one(outliers):
    """Channels are drawn independently of each other, as the prediction takes them to be; sampling leaves 10 %."""
    weight, x, ranges = layer(outliers)
    for migrates in (False, True):
        choice = choose_numbers({"a": weight}, ranges, W8A8, "w8a8", migrates=migrates)["a"]
        assert choice.errors["chosen"] == pytest.approx(measured(weight, x, choice), rel=0.1)


def test_outliers_are_migrated_where_an_input_can_be_divided():
    weight, x, ranges = layer(30)
    fixed, moved = (choose_numbers({"a": weight}, ranges, W8A8, "w8a8", migrates=m)["a"] for m in (False, True))
    assert fixed.strength == 0
    assert "migration" not in fixed.tensors
    assert moved.strength in STRENGTHS
    assert moved.errors["rounded"] == fixed.errors["chosen"]
    assert measured(weight, x, moved) < measured(weight, x, fixed) / 2


def test_what_has_no_outliers_is_left_alone():
    """Every channel reaches as far as any other."""
    weight, _, ranges = layer(1)
    flat = np.ones_like(ranges.highest)
    ranges = replace(ranges, lowest=-flat, highest=flat, magnitude=flat[0, 0, :1])
    assert choose_numbers({"a": weight}, ranges, W8A8, "w8a8", migrates=True)["a"].strength == 0


def test_layers_of_one_input_share_its_migration():
    weight, _, ranges = layer(30)
    found = choose_numbers({"a": weight, "b": 3 * weight.flip(0)}, ranges, W8A8, "w8a8", migrates=True)
    assert np.array_equal(found["a"].tensors["migration"], found["b"].tensors["migration"])
    assert np.array_equal(found["a"].tensors["scale"], found["b"].tensors["scale"])


def test_a_migration_is_that_of_its_paper_and_dead_channels_have_none():
    weight, _, ranges = layer(30)
    dead = np.array(ranges.lowest)
    dead[..., 5] = 0
    high = np.array(ranges.highest)
    high[..., 5] = 0
    weight[:, 7] = 0
    found = migration_vector([weight], replace(ranges, lowest=dead, highest=high), W8A8, 0.7).double().numpy()
    channels = np.maximum(np.abs(dead), np.abs(high))[0, 0].astype(float)
    with np.errstate(divide="ignore"):
        expected = channels**0.7 / np.abs(weight.numpy()).max(axis=0) ** 0.3
    used = [index for index in range(weight.shape[1]) if index not in (5, 7)]
    ratio = found[used] / expected[used]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert np.prod(found[used]) == pytest.approx(1, rel=1e-4)
    assert (found[5], found[7]) == (1, 1)


@pytest.mark.parametrize("width", [64, 96])
def test_searched_scales_of_blocks_lose_less_on_the_input_that_was_seen(width):
    weight, x, ranges = layer(10, width)
    choice = choose_numbers({"a": weight}, ranges, W4, "w4", migrates=False)["a"]
    plain = replace(choice, tensors={"blocks": block_scales(weight, W4).numpy()})
    assert choice.errors["chosen"] < choice.errors["rounded"]
    assert choice.errors["rounded"] == pytest.approx(measured(weight, x, plain), rel=0.15)
    assert measured(weight, x, choice) < measured(weight, x, plain)


def test_scales_by_rounding_alone_give_the_engines_own_blocks():
    """The library's quantiser is the oracle of what a bundle stores by given scales."""
    weight, *_ = layer(1)
    given = rounded_weight(weight, W4, block_scales(weight, W4))
    differing = (given != rounded_weight(weight, W4)).float().mean()
    assert differing < 0.01, "ties alone"
