"""Wavelets against PyWavelets, and the operators between scales against the supplement's equations."""

import numpy as np
import pytest
import pywt
from flow import downsample, upsample
from hypothesis import given
from hypothesis import strategies as st
from pyrexport.runtime.chain.levels import gain, up
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.resample import draw_high_bands, renoise_with, upsample_and_renoise
from pyrexport.runtime.chain.wavelets import WAVELETS, analyse, high_bands, synthesise, wavelet_taps
from pyrexport.runtime.errors import UsageError

NAMES = ("haar", "db2", "db4", "sym4", "coif1")
# float64: a few hundred operations of 1e-16; float32: the same of 6e-8, on values of order 1.
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-6}
AXES = [(1,), (2, 3), (1, 2, 3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bands_are_those_of_pywavelets_up_to_its_roll(name, axes, dtype):
    x = np.random.default_rng(0).standard_normal((2, 8, 16, 12)).astype(dtype)
    taps = wavelet_taps(name)
    bands = analyse(x, taps, axes)
    roll = -(len(taps) // 2 - 1)
    rolled = np.roll(x.astype(np.float64), (roll,) * len(axes), axes)
    expected = pywt.dwtn(rolled, name, mode="periodization", axes=axes)
    for key, band in bands.items():
        oracle = expected[key.replace("0", "a").replace("1", "d")]
        assert band.dtype == dtype
        assert np.abs(band - oracle).max() < TOLERANCE[dtype], (name, axes, key)
    # PyWavelets' table of sym4 is orthonormal to 1e-12 only, and three axes add up.
    assert np.abs(synthesise(bands, taps, axes) - x).max() < TOLERANCE[dtype] * (10 if name == "sym4" else 1)


def test_taps_are_pywavelets_own():
    for name, taps in WAVELETS.items():
        assert np.allclose(taps, pywt.Wavelet(name).rec_lo, atol=1e-15), name


def test_haar_is_average_pooling_and_nearest_neighbour():
    x = np.random.default_rng(1).standard_normal((3, 4, 6, 8))
    pooled = x.reshape(3, 2, 2, 3, 2, 4, 2).mean(axis=(2, 4, 6))
    assert np.allclose(downsample(x, WAVELETS["haar"], (1, 2, 3)), pooled, atol=1e-14)
    nearest = pooled.repeat(2, 1).repeat(2, 2).repeat(2, 3)
    assert np.allclose(upsample(pooled, WAVELETS["haar"], (1, 2, 3)), nearest, atol=1e-14)


def test_the_fast_path_of_haar_is_the_general_filter():
    x = np.random.default_rng(2).standard_normal((1, 4, 4, 4))
    nearly = tuple(np.nextafter(tap, 1) for tap in WAVELETS["haar"])  # not recognised as Haar
    for key, band in analyse(x, WAVELETS["haar"], (1, 2, 3)).items():
        assert np.allclose(band, analyse(x, nearly, (1, 2, 3))[key], atol=1e-14)
    bands = analyse(x, WAVELETS["haar"], (1, 2, 3))
    assert np.allclose(synthesise(bands, nearly, (1, 2, 3)), x, atol=1e-14)


@given(st.sampled_from(NAMES), st.sampled_from(AXES), st.integers(0, 2**32))
def test_down_inverts_up_and_bands_are_orthonormal(name, axes, seed):
    taps = wavelet_taps(name)
    x = np.random.default_rng(seed).standard_normal((2, 2, 4, 6))
    assert np.abs(downsample(upsample(x, taps, axes), taps, axes) - x).max() < 1e-11
    bands = analyse(np.repeat(x, 2, 1), taps, axes)
    energy = sum((band**2).sum() for band in bands.values())
    assert energy == pytest.approx((np.repeat(x, 2, 1) ** 2).sum(), rel=1e-11)


def matrices(sigma, taps, shape, axes):
    """R↑_N as matrices: (x, z) -> A x + B z, column by column."""
    size = int(np.prod(shape))
    keys = high_bands(len(axes))
    zero = {key: np.zeros(shape) for key in keys}
    unit = np.eye(size).reshape(size, *shape)
    a = np.stack([renoise_with(e, zero, sigma, taps, axes).ravel() for e in unit], axis=1)
    b = [renoise_with(np.zeros(shape), zero | {key: e}, sigma, taps, axes).ravel() for key in keys for e in unit]
    return a, np.stack(b, axis=1)


@pytest.mark.parametrize("name", ["haar", "db2"])
@pytest.mark.parametrize("axes", [(2, 3), (1, 2, 3)])
@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0])
def test_renoising_has_exactly_the_mean_and_covariance_of_the_supplement(name, axes, sigma):
    taps, shape = wavelet_taps(name), (1, 2, 4, 4)
    a, b = matrices(sigma, taps, shape, axes)
    tau = up(gain(len(axes)), sigma)
    size = a.shape[1]
    up_matrix = np.stack([upsample(e.reshape(shape), taps, axes).ravel() for e in np.eye(size)], axis=1)
    # Mean: A (1-σ) x0 = (1-τ) R↑(x0) (eq. 8 and 10). Covariance: σ² A Aᵀ + B Bᵀ = τ² I (eq. 9 and 11).
    assert np.abs((1 - sigma) * a - (1 - tau) * up_matrix).max() < 1e-12
    assert np.abs(sigma**2 * a @ a.T + b @ b.T - tau**2 * np.eye(len(a))).max() < 1e-12


def test_renoising_is_linear():
    random = np.random.default_rng(3)
    shape, axes, taps = (2, 2, 4, 4), (1, 2, 3), wavelet_taps("db2")
    xs = random.standard_normal((2, *shape))
    zs = [{key: random.standard_normal(shape) for key in high_bands(3)} for _ in range(2)]
    both = renoise_with(xs[0] + 2 * xs[1], {k: zs[0][k] + 2 * zs[1][k] for k in zs[0]}, 0.3, taps, axes)
    parts = [renoise_with(x, z, 0.3, taps, axes) for x, z in zip(xs, zs, strict=True)]
    assert np.abs(both - parts[0] - 2 * parts[1]).max() < 1e-12


def test_a_seeded_draw_has_the_level_that_renoising_promises():
    sigma, axes, taps = 0.5, (1, 2, 3), wavelet_taps("haar")
    random = generator(0)
    noise = random.standard_normal((64, 8, 16, 16), dtype=np.float32) * np.float32(sigma)
    y = upsample_and_renoise(noise, sigma, taps, axes, random)
    tau = up(gain(3), sigma)
    # 8.4 million values: the sample deviation is within 1/sqrt(2n) = 2.4e-4 of tau, four of those allowed.
    assert y.std() == pytest.approx(tau, rel=1e-3)
    blocks = y.reshape(64, 8, 2, 16, 2, 16, 2).transpose(2, 4, 6, 0, 1, 3, 5).reshape(8, -1)
    assert np.abs(np.corrcoef(blocks) - np.eye(8)).max() < 4 / np.sqrt(blocks.shape[1])


def test_haar_in_two_dimensions_is_the_pyramid_flow_jump():
    sigma, axes, shape = 0.4, (2, 3), (1, 1, 2, 2)
    taps, tau = wavelet_taps("haar"), up(2, 0.4)
    a, b = matrices(sigma, taps, shape, axes)
    nearest = np.stack([e.reshape(shape).repeat(2, 2).repeat(2, 3).ravel() for e in np.eye(4)], axis=1)
    assert np.abs(a - (1 - tau) / (1 - sigma) * nearest).max() < 1e-12
    block = np.full((4, 4), -1 / 3) + np.eye(4) * 4 / 3
    order = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).ravel()  # pixels block by block
    covariance = (b @ b.T)[np.ix_(order, order)]
    assert np.abs(covariance - (np.sqrt(3) * tau / 2) ** 2 * np.kron(np.eye(4), block)).max() < 1e-12


def test_high_bands_are_drawn_in_binary_order():
    drawn = draw_high_bands(generator(5), (1, 2, 2, 2), 3)
    assert list(drawn) == ["001", "010", "011", "100", "101", "110", "111"]
    again = generator(5)
    for band in drawn.values():
        assert band.dtype == np.float32
        assert np.array_equal(band, again.standard_normal((1, 2, 2, 2), dtype=np.float32))


@pytest.mark.parametrize(
    ("wavelet", "words"),
    [
        ("db99", "unknown wavelet 'db99': expected one of haar"),
        ([0.7, 0.8], "not orthonormal"),
        ([1.0], "even number"),
        ([0.70710678, -0.70710678], "sum to"),
        (["a", "b"], "list of low-pass taps"),
    ],
)
def test_what_is_not_an_orthonormal_wavelet_is_refused(wavelet, words):
    with pytest.raises(UsageError, match=words):
        wavelet_taps(wavelet)
