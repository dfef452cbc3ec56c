"""Running statistics of the inputs of layers: extremes, sums of squares, and a histogram for percentiles.

These alone are kept, never an activation, so that runs of several prompts add up, in one go or in several.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.ranges import Ranges

__all__ = ["BINS", "Place", "Seen", "Sizes", "Statistics", "histogram", "percentile"]

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

COMBINED: Mapping[str, np.ufunc] = {
    "lowest": np.minimum,
    "highest": np.maximum,
    "squares": np.add,
    "count": np.add,
    "passes": np.maximum,
    "steps": np.maximum,
    "histogram": np.add,
}
"""How the statistics of two runs become those of both. Of these the sums of squares alone depend on the order."""

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
                "lowest": np.full((stages, groups, width), np.inf, np.float32),
                "highest": np.full((stages, groups, width), -np.inf, np.float32),
                "squares": np.zeros((stages, width), np.float64),
                "count": np.zeros(stages, np.int64),
                "passes": np.zeros((stages, sizes.passes), np.float32),
                "steps": np.zeros(sizes.steps, np.float32),
                "histogram": np.zeros((stages, BINS), np.int64),
            }
        )

    @property
    def finite(self) -> bool:
        """Whether every value was: NaN and infinity stay in the sums."""
        return bool(np.isfinite(self.arrays["squares"]).all())

    def see(self, place: Place, group: int, values: Floats) -> None:
        """Add the values [tokens, in] of a frame group."""
        arrays, rows, at = self.arrays, max(1, PIECE_VALUES // values.shape[1]), (place.stage, group)
        for start in range(0, len(values), rows):
            piece = values[start : start + rows]
            low, high = piece.min(axis=0), piece.max(axis=0)
            np.minimum(arrays["lowest"][at], low, out=arrays["lowest"][at])
            np.maximum(arrays["highest"][at], high, out=arrays["highest"][at])
            arrays["squares"][place.stage] += np.square(piece, dtype=np.float64).sum(axis=0)
            arrays["count"][place.stage] += len(piece)
            arrays["histogram"][place.stage] += histogram(piece)
            greatest = max(-low.min(), high.max())
            for name, index in (("passes", (place.stage, place.passed)), ("steps", place.step)):
                arrays[name][index] = np.maximum(arrays[name][index], greatest)

    def add(self, other: "Statistics") -> None:
        """Add what another run has seen."""
        arrays = self.arrays  # which may be read-only, where they come from another process
        self.arrays = {name: combine(arrays[name], other.arrays[name]) for name, combine in COMBINED.items()}

    def ranges(self, percent: float) -> Ranges:
        """What a recipe says of the input: the magnitude is never above the greatest that was seen."""
        arrays = self.arrays
        greatest = np.maximum(np.abs(arrays["lowest"]), np.abs(arrays["highest"])).max(axis=(1, 2))
        magnitudes = [percentile(counts, percent) for counts in arrays["histogram"]]
        return Ranges(
            lowest=arrays["lowest"],
            highest=arrays["highest"],
            square=(arrays["squares"] / np.maximum(arrays["count"], 1)[:, None]).astype(np.float32),
            magnitude=np.minimum(np.array(magnitudes, np.float32), greatest),
            passes=arrays["passes"],
            steps=arrays["steps"],
        )


@dataclass
class Seen:
    """What layers were given in some runs."""

    inputs: dict[str, Statistics] = field(default_factory=dict)
    """Statistics of inputs, by the first layer that each goes into."""
    owners: dict[str, str] = field(default_factory=dict)
    """Of each layer, which layer's input is its own."""

    def add(self, other: "Seen") -> None:
        """Add what was seen in another run of the same layers."""
        self.owners |= other.owners
        for layer, statistics in other.inputs.items():
            if layer in self.inputs:
                self.inputs[layer].add(statistics)
            else:
                self.inputs[layer] = statistics
