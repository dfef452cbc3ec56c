"""The histogram of magnitudes and the percentiles that are read from it."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyrexport.calibration.statistics import BINS, Place, Sizes, Statistics, histogram, percentile

SIZES = Sizes(stages=2, passes=2, steps=3)


@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32)), st.floats(0.1, 100))
def test_a_percentile_is_true_within_a_bin(values, percent):
    magnitudes = np.sort(np.abs(values))
    rank = math.ceil(Fraction(repr(percent)) * len(values) / 100)
    true = float(magnitudes[max(rank, 1) - 1])
    found = percentile(histogram(values), percent)
    assert true < found <= max(true * (1 + 1 / 64), 2**-20)


def test_every_magnitude_has_one_bin():
    values = np.array([0, -0.0, 1e-30, 2**-20, 1.0, -1.0, 1.015625, 2**20, 1e30, np.inf], np.float32)
    counts = histogram(values)
    assert counts.shape == (BINS,)
    assert counts.sum() == len(values)
    assert (counts[0], counts[1], counts[-1]) == (3, 1, 3)
    middle = 1 + 64 * 20
    assert (counts[middle], counts[middle + 1]) == (2, 1)
    assert percentile(counts, 100) == math.inf


@pytest.mark.parametrize("pieces", [(7,), (3, 5, 2)])
def test_pieces_and_orders_add_up_to_the_same(pieces):
    rows = np.random.default_rng(0).standard_normal((sum(pieces), 5)).astype(np.float32)
    parts = np.split(rows, np.cumsum(pieces)[:-1])
    one, other = (Statistics.begin(SIZES, 1, 5) for _ in range(2))
    for part in parts:
        one.see(Place(0, 1, 0), 0, part)
    for part in reversed(parts):
        other.see(Place(0, 1, 0), 0, part[::-1])
    for name, array in one.arrays.items():
        # Sums of squares alone depend on their order, by the rounding of float64.
        np.testing.assert_allclose(array, other.arrays[name], 1e-14 if name == "squares" else 0, err_msg=name)
    assert np.array_equal(one.arrays["lowest"][0, 0], rows.min(axis=0))
    assert np.array_equal(one.arrays["highest"][0, 0], rows.max(axis=0))
    np.testing.assert_allclose(one.ranges(100.0).square[0], np.mean(rows.astype(float) ** 2, axis=0), 1e-6)


def test_values_wider_than_a_piece_are_seen_whole(monkeypatch):
    monkeypatch.setattr("pyrexport.calibration.statistics.PIECE_VALUES", 4)
    rows = np.arange(30, dtype=np.float32).reshape(3, 10) - 12
    seen = Statistics.begin(SIZES, 1, 10)
    seen.see(Place(1, 0, 1), 0, rows)
    assert (seen.arrays["lowest"][1].min(), seen.arrays["highest"][1].max()) == (-12, 17)
    assert seen.arrays["histogram"].sum(axis=1).tolist() == [0, 30]
    assert np.array_equal(seen.arrays["passes"], [[0, 0], [0, 17]])
