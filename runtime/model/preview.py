"""The map of previews: a linear one, from a latent's channels to red, green and blue."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..documents import Fields, is_number

__all__ = ["LEAST_R2", "Preview", "PreviewMap"]

LEAST_R2 = 0.5
"""Share of the variance that a map explains at least: with less, the image would show nothing."""

Preview = NDArray[np.uint8]
"""Frames [T, h, w, 3] of a latent, a pixel for each latent pixel."""


@dataclass(frozen=True)
class PreviewMap:
    """A linear map, from latents as the transformer sees them to colours in 0 … 1."""

    rgb: tuple[tuple[float, float, float], ...]
    """A row for each channel, and one that is added."""
    r2: float
    """Share of the variance of colours that it explained where it was fitted; 1 where it was given."""

    @classmethod
    def from_json(cls, document: Any, channels: int, source: str) -> "PreviewMap":
        """Read the field `preview` of a manifest, or `preview_rgb` of a `pyramid.json`.

        Raises:
            UsageError: it is not a map of so many channels.
        """
        fields = Fields(document, source)
        fields.only(("rgb", "r2"))

        def is_row(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))

        rows = fields.get(
            "rgb",
            f"{channels} rows of red, green and blue, one for each channel, and one that is added",
            lambda v: isinstance(v, list) and len(v) == channels + 1 and all(map(is_row, v)),
        )
        return cls(tuple((float(r), float(g), float(b)) for r, g, b in rows), fields.number("r2", 1.0))

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {"rgb": [list(row) for row in self.rgb], "r2": self.r2}

    def show(self, latent: NDArray[np.float32]) -> Preview:
        """Frames [T, h, w, 3] of a latent [C, T, h, w]."""
        rows = np.array(self.rgb, np.float32)
        colours = np.tensordot(latent, rows[:-1], axes=(0, 0)) + rows[-1]
        return np.asarray((np.clip(colours, 0, 1) * np.float32(255)).round(), np.uint8)
