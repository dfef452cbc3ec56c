"""One level of an orthonormal periodised wavelet transform over any set of axes (supplement A1).

Convention: `U[k, (2k+j) mod n] = h[j]` for the low-pass taps h and `V` alike with `g[j] = (-1)^j h[L-1-j]`.
With h PyWavelets' `rec_lo`, its `periodization` mode gives the same bands for the input rolled back by `L/2 - 1`
samples. Arrays keep their dtype.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["WAVELETS", "Array", "Bands", "Taps", "analyse", "high_bands", "synthesise", "wavelet_taps"]

Array = NDArray[Any]
Taps = tuple[float, ...]
Bands = Mapping[str, Array]
"""One array per band. A key has a letter per halved axis, in order: "0" low, "1" high ("000" is the low band)."""

_HAAR: Taps = (math.sqrt(0.5), math.sqrt(0.5))

WAVELETS: Mapping[str, Taps] = {
    "haar": _HAAR,
    "db2": (
        0.48296291314453416,
        0.8365163037378079,
        0.2241438680420134,
        -0.12940952255126037,
    ),
    "db3": (
        0.33267055295008263,
        0.8068915093110925,
        0.45987750211849154,
        -0.13501102001025458,
        -0.08544127388202666,
        0.03522629188570953,
    ),
    "db4": (
        0.2303778133088965,
        0.7148465705529157,
        0.6308807679298589,
        -0.027983769416859854,
        -0.18703481171909309,
        0.030841381835560764,
        0.0328830116668852,
        -0.010597401785069032,
    ),
    "sym4": (
        0.0322231006040427,
        -0.012603967262037833,
        -0.09921954357684722,
        0.29785779560527736,
        0.8037387518059161,
        0.49761866763201545,
        -0.02963552764599851,
        -0.07576571478927333,
    ),
    "coif1": (
        -0.07273261951252645,
        0.33789766245748176,
        0.8525720202116003,
        0.3848648468648577,
        -0.07273261951252645,
        -0.015655728135791986,
    ),
}
"""Low-pass taps in the order of the scaling filter (PyWavelets' `rec_lo`)."""


def wavelet_taps(wavelet: str | Sequence[float]) -> Taps:
    """Low-pass taps of a wavelet given by name or by its taps.

    Raises:
        UsageError: the name is unknown, or the taps are not those of an orthonormal wavelet.
    """
    if isinstance(wavelet, str):
        if wavelet not in WAVELETS:
            raise UsageError(
                f"unknown wavelet '{wavelet}': expected one of {', '.join(WAVELETS)}, or a list of low-pass taps"
            )
        return WAVELETS[wavelet]
    # Taps of an orthonormal filter lie within -1 … 1; what is larger would overflow in the check.
    if not all(type(tap) in (int, float) and abs(tap) <= 1.000001 for tap in wavelet):
        raise UsageError(f"a wavelet is a name or a list of low-pass taps within -1 … 1, found {list(wavelet)!r:.80}")
    taps = tuple(map(float, wavelet))
    _check_orthonormal(taps)
    return taps


def _check_orthonormal(taps: Taps) -> None:
    if len(taps) < 2 or len(taps) % 2:
        raise UsageError(f"a wavelet needs an even number of low-pass taps, at least 2; found {list(taps)}")
    h = np.array(taps)
    # Published tables carry ten digits or more; a filter that is off by more than that is another filter.
    for shift in range(0, len(taps), 2):
        product_sum = float(h[shift:] @ h[: len(h) - shift])
        if abs(product_sum - (shift == 0)) > 1e-8:
            raise UsageError(
                f"the low-pass taps are not orthonormal: expected sum h[j]·h[j+{shift}] = {int(shift == 0)}, "
                f"found {product_sum:.6g}"
            )
    if abs(sum(taps) - math.sqrt(2)) > 1e-8:
        raise UsageError(f"low-pass taps sum to sqrt(2) = {math.sqrt(2):.6g}, found {sum(taps):.6g}")


def high_bands(axes: int) -> list[str]:
    """Keys of the high bands over `axes` halved axes, in binary order: "01", "10", "11" for two."""
    return ["".join(bits) for bits in product("01", repeat=axes)][1:]


def analyse(x: Array, taps: Taps, axes: Sequence[int]) -> dict[str, Array]:
    """Bands `W x` of an array, each with the given axes halved.

    Raises:
        ValueError: an axis to be halved has an odd length.
    """
    bands = {"": x}
    for axis in axes:
        halves = {key: _analyse_axis(band, taps, axis) for key, band in bands.items()}
        bands = {key + bit: half[int(bit)] for key, half in halves.items() for bit in "01"}
    return bands


def synthesise(bands: Bands, taps: Taps, axes: Sequence[int]) -> Array:
    """The array `Wᵀ (low; high)` whose bands are given; a missing high band counts as zero."""
    bands = dict(bands)
    for axis in reversed(axes):
        prefixes = dict.fromkeys(key[:-1] for key in bands)
        bands = {
            prefix: _synthesise_axis(bands.get(prefix + "0"), bands.get(prefix + "1"), taps, axis)
            for prefix in prefixes
        }
    return bands[""]


def _high_pass(taps: Taps) -> Taps:
    return tuple((-1) ** j * tap for j, tap in enumerate(reversed(taps)))


def _analyse_axis(x: Array, taps: Taps, axis: int) -> tuple[Array, Array]:
    if x.shape[axis] % 2:
        raise ValueError(f"axis {axis} has odd length {x.shape[axis]} and cannot be halved")
    phases = _every_second(x, axis)
    if taps == _HAAR:
        return (phases[0] + phases[1]) * taps[0], (phases[0] - phases[1]) * taps[0]
    low = high = np.zeros_like(phases[0])
    for j, (h, g) in enumerate(zip(taps, _high_pass(taps), strict=True)):
        window = np.roll(phases[j % 2], -(j // 2), axis)
        low, high = low + h * window, high + g * window
    return low, high


def _synthesise_axis(low: Array | None, high: Array | None, taps: Taps, axis: int) -> Array:
    known = low if low is not None else high
    assert known is not None
    shape = list(known.shape)
    shape[axis] *= 2
    out = np.zeros(shape, known.dtype)
    phases = _every_second(out, axis)
    if taps == _HAAR and low is not None and high is not None:
        phases[0][...] = (low + high) * taps[0]
        phases[1][...] = (low - high) * taps[0]
        return out
    for band, filter_taps in ((low, taps), (high, _high_pass(taps))):
        if band is not None:
            for j, tap in enumerate(filter_taps):
                phases[j % 2][...] += tap * np.roll(band, j // 2, axis)
    return out


def _every_second(x: Array, axis: int) -> tuple[Array, Array]:
    """Views of the even and the odd samples along an axis."""
    index = [slice(None)] * x.ndim
    even, odd = list(index), list(index)
    even[axis], odd[axis] = slice(0, None, 2), slice(1, None, 2)
    return x[tuple(even)], x[tuple(odd)]
