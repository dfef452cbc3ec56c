"""What a recipe decides for each layer: its scheme, and the numbers by which it is rounded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .documents import Fields
from .errors import UsageError
from .quantisation import METHODS, SCHEMES
from .ranges import Floats, Ranges, check_array

__all__ = ["TENSORS", "Choice"]

TENSORS = ("scale", "zero", "migration", "blocks")
"""What a recipe can hold of a layer's choice."""


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer."""

    scheme: str
    """A name of `METHODS`, or empty: it is kept as its component's other weights are."""
    reason: str = ""
    """Why it is kept."""
    strength: float = 0.0
    """Of the migration: the exponent α of s_j = max|x_j|^α / max|W_j|^(1-α) (SmoothQuant, arXiv 2211.10438, eq. 4)."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Relative L2 of its product as its statistics predict it: `rounded` without a search, and as `chosen`."""
    damage: tuple[float, ...] = ()
    """Relative L2 of each stage's velocity with this layer alone rounded; empty where that was not measured."""
    tensors: Mapping[str, Floats] = field(default_factory=dict)
    """float32: `scale`, `zero` [stages] of its input's integers; `migration` [in] that the input is divided and the
    weight multiplied by; `blocks` [out · blocks], scales of the weight's blocks."""

    @property
    def migration(self) -> Floats | None:
        """What the input is divided by [in]."""
        return self.tensors.get("migration")

    @classmethod
    def from_json(cls, document: Any, source: str, tensors: Mapping[str, Floats]) -> "Choice":
        """Read what `to_json` wrote.

        Raises:
            UsageError: a field is missing or impossible.
        """
        found = Fields(document, source)
        errors = found.object("errors")
        return cls(
            scheme=found.text("scheme", choices=("", *METHODS)),
            reason=found.text("reason"),
            strength=found.number("strength"),
            errors={name: errors.number(name) for name in errors.document},
            damage=found.numbers("damage"),
            tensors=tensors,
        )

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads, without tensors."""
        return {
            "scheme": self.scheme,
            "reason": self.reason,
            "strength": self.strength,
            "errors": dict(self.errors),
            "damage": list(self.damage),
            "tensors": list(self.tensors),
        }

    def check(self, name: str, ranges: Ranges) -> None:
        """Refuse numbers that nothing can be rounded by.

        Raises:
            UsageError: a tensor is missing, misshaped, not finite or not positive; names the layer.
        """
        stages = len(ranges.magnitude)
        needed = ("scale", "zero") if self.scheme and SCHEMES[self.scheme].activations == "static" else ()
        for tensor in needed:
            if tensor not in self.tensors:
                raise UsageError(f"tensor '{name}/{tensor}' is missing; calibrate again")
        shapes = {"scale": (stages,), "zero": (stages,), "migration": (ranges.width,)}
        for tensor, array in self.tensors.items():
            where = f"layer '{name}', {tensor}"
            check_array(where, array, shapes.get(tensor, array.shape))
            if tensor in ("scale", "migration") and not (array > 0).all():
                raise UsageError(f"{where}: expected values above 0, found {array.min():g}; calibrate again")
        zero = self.tensors.get("zero", np.zeros(1, np.float32))
        if (zero != zero.round()).any() or zero.min() < 0 or zero.max() > 255:
            raise UsageError(f"layer '{name}': expected zeros that are whole numbers from 0 to 255; calibrate again")
