"""Running statistics of the inputs of layers: extremes, and a histogram from which percentiles are read.

Maxima and counts alone are kept, never an activation. They do not depend on the order in which values come, so that
runs of several prompts add up to the same, in one go or in several.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.recipe import Ranges, integer_range

__all__ = ["BINS", "Place", "Sizes", "Statistics", "histogram", "percentile"]

PER_OCTAVE = 64
"""Bins from each power of two to the next, equally wide: a value is known to 1/64 of itself."""
LEAST, GREATEST = -20, 20
"""Powers of two between which magnitudes are told apart."""
BINS = PER_OCTAVE * (GREATEST - LEAST) + 2
"""One bin holds all below, zero included, and one all above."""
_SHIFT = 23 - 6  # a float32 has 23 bits after its exponent's: the first six of them are the bin within its octave
_FIRST = (127 + LEAST) * PER_OCTAVE
PIECE_VALUES = 2**18
"""Values that are looked at at once: temporary arrays hold so many, and fit in a core's cache."""

Floats = NDArray[np.float32]


def histogram(values: Floats) -> NDArray[np.int64]:
    """How many of some values have their magnitude in each bin [BINS]: their leading bits are its number."""
    bits = (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)
    bins = np.clip(bits, _FIRST - 1, _FIRST + BINS - 2) - np.uint32(_FIRST - 1)
    return np.bincount(bins.ravel(), minlength=BINS)


def percentile(counts: NDArray[np.int64], percent: float) -> float:
    """The upper end of the bin that holds the smallest magnitude below or at which so many per cent of all lie.

    Infinite where that is the bin of all that are too large to be told apart.
    """
    rank = max(math.ceil(Fraction(repr(percent)) * int(counts.sum()) / 100), 1)
    found = int(np.searchsorted(np.cumsum(counts), rank))
    return math.inf if found == BINS - 1 else float(np.uint32((_FIRST + found) << _SHIFT).view(np.float32))


@dataclass(frozen=True)
class Place:
    """Where in a run values are seen."""

    stage: int
    step: int
    passed: int
    """Which evaluation of the step: see `PASSES`."""


@dataclass(frozen=True)
class Sizes:
    """How much is told apart in a run."""

    stages: int
    passes: int
    steps: int


class Statistics:
    """What the input of one layer was so far."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Go on from what was kept; see `begin`."""
        self.arrays = arrays

    @classmethod
    def begin(cls, sizes: Sizes, groups: int, width: int) -> "Statistics":
        """Statistics that have seen nothing, of an input of so many frame groups and channels."""
        stages = sizes.stages
        return cls(
            {
                "lowest": np.full(stages, np.inf, np.float32),
                "highest": np.full(stages, -np.inf, np.float32),
                "channels": np.zeros((stages, groups, width), np.float32),
                "passes": np.zeros((stages, sizes.passes), np.float32),
                "steps": np.zeros(sizes.steps, np.float32),
                "histogram": np.zeros((stages, BINS), np.int64),
            }
        )

    @property
    def finite(self) -> bool:
        """Whether every value was: NaN and infinity stay in the maxima."""
        return bool(np.isfinite(self.arrays["channels"]).all())

    def see(self, place: Place, group: int, values: Floats) -> None:
        """Add the values [tokens, in] of a frame group."""
        arrays, rows = self.arrays, max(1, PIECE_VALUES // values.shape[1])
        for start in range(0, len(values), rows):
            piece = values[start : start + rows]
            low, high = piece.min(axis=0), piece.max(axis=0)
            channels = np.maximum(np.abs(low), np.abs(high))
            for name, at, found, wider in (
                ("lowest", place.stage, low.min(), np.minimum),
                ("highest", place.stage, high.max(), np.maximum),
                ("channels", (place.stage, group), channels, np.maximum),
                ("passes", (place.stage, place.passed), channels.max(), np.maximum),
                ("steps", place.step, channels.max(), np.maximum),
            ):
                arrays[name][at] = wider(arrays[name][at], found)
            arrays["histogram"][place.stage] += histogram(piece)

    def ranges(self, percent: float) -> Ranges:
        """What a recipe says of the layer: the magnitude is never above the greatest that was seen."""
        kept = {name: array for name, array in self.arrays.items() if name != "histogram"}
        greatest = kept["channels"].max(axis=(1, 2))
        magnitudes = [percentile(counts, percent) for counts in self.arrays["histogram"]]
        magnitude = np.minimum(np.array(magnitudes, np.float32), greatest)
        scale, zero = integer_range(kept["lowest"], kept["highest"], magnitude)
        return Ranges(**kept, magnitude=magnitude, scale=scale, zero=zero)
