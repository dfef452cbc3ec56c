"""Tiny decoders of video latents as data (TAEHV, such as `taew2_1`): what the shapes of their tensors say.

Their files carry no configuration, and name layers by their place in one sequence: a convolution, then three levels of
three memory blocks, a doubling in space, a growth in time and a convolution, then a last convolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...chain.pyramid import Geometry
from ...documents import Fields
from ...errors import UsageError
from .family import Shapes

__all__ = ["GROWTH", "Level", "TinyDecoderConfig"]

BLOCKS = 3
"""Memory blocks of a level."""

GROWTH = (1, 2, 2)
"""Frames that each level makes of one."""

MEMORY_LAYERS = (0, 2, 4)
"""Places of a memory block's convolutions in its own sequence."""


@dataclass(frozen=True)
class Level:
    """The names of a level's layers: those of their tensors, without `.weight` and `.bias`."""

    blocks: tuple[tuple[str, ...], ...]
    """Of each memory block, its convolutions."""
    growth: str
    """What makes frames of a frame; it has no bias."""
    narrowing: str
    """The convolution of the larger frames; it has no bias."""


@dataclass(frozen=True)
class TinyDecoderConfig:
    """What a tiny decoder's shapes depend on."""

    channels: int = 16
    """Of the latents."""
    widths: tuple[int, ...] = (256, 128, 64, 64)
    """Channels of each level, and of the last convolution's input."""
    patch_size: int = 1
    """Pixels of a side that the last convolution makes at once."""
    normalised: ClassVar[bool] = True
    cut: ClassVar[bool] = False
    first_layer: ClassVar[str] = "decoder.1"
    last_layer: ClassVar[str] = "decoder.22"
    levels: ClassVar[tuple[Level, ...]] = tuple(
        Level(
            tuple(tuple(f"decoder.{place + block}.conv.{index}" for index in MEMORY_LAYERS) for block in range(BLOCKS)),
            f"decoder.{place + BLOCKS + 1}.conv",
            f"decoder.{place + BLOCKS + 2}",
        )
        for place in (3, 9, 15)
    )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], geometry: Geometry, source: str) -> "TinyDecoderConfig":
        """What the tensors of a file say.

        Args:
            shapes: of its tensors, by their names.
            geometry: of the latents that it is to decode.
            source: names the file in errors.

        Raises:
            UsageError: the tensors are not a tiny decoder's, or it is one of other latents.
        """

        def weight(layer: str) -> Sequence[int]:
            shape = shapes.get(f"{layer}.weight", ())
            if len(shape) != 4:
                raise UsageError(
                    f"{source}: expected a tiny decoder (TAEHV), whose tensor '{layer}.weight' is a convolution's, "
                    "found none; a whole VAE is given with --vae"
                )
            return shape

        last = weight(cls.last_layer)
        widths = (*(weight(level.blocks[0][-1])[0] for level in cls.levels), last[1])
        patch = next((n for n in range(1, 9) if 3 * n**2 == last[0]), 0)
        if not patch:
            raise UsageError(
                f"{source}: expected three colours of each pixel in {cls.last_layer}, found {last[0]} rows"
            )
        config = cls(weight(cls.first_layer)[1], widths, patch)
        config._require(geometry, source)
        return config

    @classmethod
    def from_json(cls, fields: Fields, geometry: Geometry) -> "TinyDecoderConfig":
        """Read the document of `to_json`.

        Raises:
            UsageError: it is malformed, or of a decoder of other latents.
        """
        fields.only(("channels", "widths", "patch_size"))
        widths = fields.get("widths", f"{len(GROWTH) + 1} whole numbers", _are_widths)
        config = cls(fields.integer("channels"), tuple(widths), fields.integer("patch_size"))
        config._require(geometry, fields.source)
        return config

    def _require(self, geometry: Geometry, source: str) -> None:
        spatial = int(2 ** len(self.levels)) * self.patch_size
        made = Geometry(channels=self.channels, temporal=2 ** sum(n == 2 for n in GROWTH), spatial=spatial)
        if made != geometry:
            ours, theirs = (f"{g.channels} channels, {g.temporal}x{g.spatial}x{g.spatial}" for g in (made, geometry))
            raise UsageError(
                f"{source}: expected a tiny decoder of latents of {theirs}, as the model's are, found {ours}"
            )

    def tensors(self) -> Shapes:
        """Name and shape of every tensor; of growths a file may have more rows, of which the last count."""
        found: Shapes = _convolution(self.first_layer, self.widths[0], self.channels)
        for level, width, following, growth in zip(self.levels, self.widths[:-1], self.widths[1:], GROWTH, strict=True):
            for first, *others in level.blocks:
                found |= _convolution(first, width, 2 * width)
                for layer in others:
                    found |= _convolution(layer, width, width)
            found[f"{level.growth}.weight"] = (growth * width, width, 1, 1)
            found[f"{level.narrowing}.weight"] = (following, width, 3, 3)
        return found | _convolution(self.last_layer, 3 * self.patch_size**2, self.widths[-1])

    def cache_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """The last frame [1, C, h, w] that went into each memory block, in order."""
        return [
            (1, channels, 2**index * height, 2**index * width)
            for index, channels in enumerate(self.widths[:-1])
            for _ in range(BLOCKS)
        ]

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {**asdict(self), "widths": list(self.widths)}


def _convolution(layer: str, out: int, into: int) -> Shapes:
    return {f"{layer}.weight": (out, into, 3, 3), f"{layer}.bias": (out,)}


def _are_widths(value: Any) -> bool:
    count = len(GROWTH) + 1
    return isinstance(value, list) and len(value) == count and all(type(n) is int and 0 < n < 2**16 for n in value)
