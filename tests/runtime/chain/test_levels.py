"""Levels and schedules against the paper's printed numbers and diffusers' scheduler."""

import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from pyrexport.runtime.chain.levels import default_clean_levels, down, gain, up
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.schedules import explicit_levels, parse_levels, parse_steps, spaced_levels
from pyrexport.runtime.chain.wavelets import WAVELETS
from pyrexport.runtime.errors import UsageError
from support.builders import FULL, pyramid


def test_gain_is_the_sum_of_orthonormal_low_pass_taps_per_axis():
    for taps in WAVELETS.values():
        for axes in (1, 2, 3):
            # Published taps carry 11 digits or more (coif1 is exact), hence 1e-9.
            assert gain(axes) == pytest.approx(sum(taps) ** axes, rel=1e-9)


def test_clean_levels_of_three_stages_are_the_papers():
    levels = default_clean_levels(3, 2 * math.sqrt(2))
    assert levels == pytest.approx((0, 2 - math.sqrt(2), 16 / 17), abs=1e-12)
    assert [round(level, 4) for level in levels[1:]] == [0.5858, 0.9412]


@pytest.mark.parametrize(
    ("natural", "stage", "rest", "first"),
    [
        (2 - math.sqrt(2), 1, 1 / 3, math.sqrt(2) - 1),
        (16 / 17, 2, 2 / 3, 4 / 5),
        (16 / 17, 1, 0.849779, 8 / 9),
        (0.8644876638781173, 1, 0.6928237, 0.7613195),
        (72 / 73, 2, 9 / 10, 18 / 19),
    ],
)
def test_global_levels_of_both_frame_groups(natural, stage, rest, first):
    groups = {group.name: group for group in pyramid().groups(FULL)}
    # The tables print six digits.
    assert groups["rest"].global_level(stage, natural) == pytest.approx(rest, abs=1e-6)
    assert groups["first"].global_level(stage, natural) == pytest.approx(first, abs=1e-6)


@given(st.floats(1.0, 64.0), st.floats(0.0, 1.0))
def test_down_inverts_up(k, sigma):
    # One rounding each way; the condition number of the map is at most k.
    assert down(k, up(k, sigma)) == pytest.approx(sigma, abs=1e-15 * 64)


def test_latent_shapes_and_tokens_at_the_papers_resolution():
    stages = pyramid().stages(FULL)
    assert [stage.latent for stage in stages] == [(16, 21, 56, 104), (16, 11, 28, 52), (16, 6, 14, 26)]
    assert [stage.tokens for stage in stages] == [30_576, 4_004, 546]


def test_ppf_keeps_the_latent_and_pads_the_grid():
    patches = ((1, 2, 2), (2, 4, 4), (4, 8, 8))
    ppf, size = pyramid("ppf", patch_sizes=patches), Resolution(81, 480, 832)
    assert {stage.latent for stage in ppf.stages(size)} == {(16, 21, 60, 104)}
    assert [stage.tokens for stage in ppf.stages(size)] == [32_760, 4_290, 624]
    assert all(group.global_level(2, 0.7) == 0.7 for group in ppf.groups(size))


@pytest.mark.parametrize("kind", ["pyramidal", "ppf"])
def test_the_rule_gives_the_papers_2_2_1(kind):
    levels = spaced_levels(pyramid(kind), (2, 2, 1))
    assert [[round(level, 4) for level in group] for group in levels] == [
        [1, 0.9863],
        [0.9412, 0.8645],
        [0.5858],
    ]
    assert levels[0][1] == pytest.approx(72 / 73, abs=1e-12)


def test_the_rule_gives_20_20_10():
    levels = spaced_levels(pyramid(), (20, 20, 10))
    ends = [(group[0], group[1], group[-1]) for group in levels]
    expected = [(1, 0.99907, 0.94987), (0.94118, 0.93610, 0.64285), (0.58579, 0.55313, 0.10131)]
    assert np.allclose(ends, expected, atol=5e-6)  # five printed digits


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (4, 5.0), (50, 5.0), (20, 3.0)])
def test_plain_schedules_are_diffusers_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    (levels,) = spaced_levels(pyramid("plain", 1), (steps,), shift)
    assert np.allclose(levels, scheduler.sigmas[:-1], atol=2e-7)  # diffusers keeps float32


def test_plain_schedules_are_the_papers():
    (four,) = spaced_levels(pyramid("plain", 1), (4,))
    assert np.allclose(four, [1, 0.90971, 0.71732, 0.02441], atol=5e-6)
    (three,) = spaced_levels(pyramid("plain", 1), (3,))
    assert three[1] == pytest.approx(0.83471, abs=5e-6)


def test_explicit_levels_snap_the_printed_boundary_and_may_leave_it_out():
    exact = explicit_levels(pyramid(), [[0.9863], [0.8645], []])
    assert exact == explicit_levels(pyramid(), parse_levels("1,0.9863/0.9412,0.8645/0.5858"))
    assert [group[0] for group in exact] == pytest.approx([1, 16 / 17, 2 - math.sqrt(2)], abs=1e-15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,0.9/0.9412/0.5858", "outside the range of stage 2"),
        ("1,0.97,0.98/0.9412/0.5858", "must decrease"),
        ("1/0.9412/0.9", "outside the range of stage 0"),
        ("1/0.9412", "3 stage"),
        ("1/a/b", "numbers"),
    ],
)
def test_levels_that_do_not_fit_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        explicit_levels(pyramid(), parse_levels(text))


def test_names_of_steps():
    assert parse_steps("20-20-10") == (20, 20, 10)
    assert parse_steps("fast") is None
    with pytest.raises(UsageError, match="at least one step"):
        spaced_levels(pyramid(), (0, 0, 50))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("81x480x832", "multiple of 64, found 480; nearest: 448|nearest: 512"),
        ("80x448x832", "16k\\+1 with k >= 1, found 80; nearest: 81"),
        ("77x448x832", "16k\\+1 with k >= 1, found 77; nearest: 81"),
        ("1x448x832", "found 1; nearest: 17"),
    ],
)
def test_impossible_resolutions_are_refused_with_the_nearest(size, words):
    with pytest.raises(UsageError, match=words):
        pyramid().stages(Resolution.parse(size))


def test_joint_first_frame_needs_even_latent_frames():
    joint = pyramid(first_frame_apart=False)
    assert joint.stages(Resolution(77, 448, 832))[2].latent[1] == 5
    with pytest.raises(UsageError, match="16k-3"):
        joint.stages(FULL)
