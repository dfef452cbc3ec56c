"""The decoders of Wan's VAEs as data: Wan2.1's, and the residual one of Wan2.2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...documents import Fields
from ...errors import UsageError

__all__ = ["Compression", "WanDecoderConfig"]


@dataclass(frozen=True)
class Compression:
    """What a VAE makes of a latent pixel."""

    temporal: int
    spatial: int
    residual: bool
    """Its levels have shortcuts around them, as Wan2.2's have."""

    def __str__(self) -> str:
        kind = "residual, " if self.residual else ""
        return f"{kind}{self.temporal}x{self.spatial}x{self.spatial}"


@dataclass(frozen=True)
class WanDecoderConfig:
    """Fields of diffusers' `AutoencoderKLWan` configuration that the decoder's shapes depend on."""

    z_dim: int = 16
    base_dim: int = 96
    """The decoder's, which diffusers' `decoder_base_dim` sets apart from the encoder's."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    """Wan2.2's: its levels keep their width, and have a shortcut around each."""
    patch_size: int = 1
    """Pixels of a side that the last convolution makes at once."""
    normalised: ClassVar[bool] = False
    cut: ClassVar[bool] = True

    @classmethod
    def from_json(
        cls, document: Mapping[str, Any], channels: int, made: Compression, source: str
    ) -> "WanDecoderConfig":
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Args:
            document: the configuration.
            channels: of the transformer's latents.
            made: what the family's VAE makes of a latent pixel.
            source: names the document in errors.

        Raises:
            UsageError: the VAE is another than the family's, or of other latents than the transformer's.
        """
        fields = Fields(document, source)
        fields.text("_class_name", "AutoencoderKLWan", choices=("AutoencoderKLWan",))
        if fields.integer("z_dim", 16) != channels:
            raise fields.wrong("z_dim", f"{channels}, the transformer's input channels")
        _check_statistics(fields, channels)
        widths = fields.get("dim_mult", "a list of whole numbers", _are_counts, [1, 2, 4, 4])
        downsample = fields.get(
            "temperal_downsample",
            f"true or false, {len(widths) - 1} times",
            lambda v: isinstance(v, list) and len(v) >= len(widths) - 1 and all(isinstance(flag, bool) for flag in v),
            [False, True, True],
        )
        blocks = fields.get(
            "num_res_blocks", "a whole number below 1024", lambda v: type(v) is int and 0 <= v < 1024, 2
        )
        residual, patch = bool(document.get("is_residual", False)), fields.integer("patch_size", 1)
        found = Compression(2 ** sum(downsample[1 - len(widths) :]), patch * 2 ** (len(widths) - 1), residual)
        if found != made:
            raise UsageError(
                f"{source}: expected a VAE of {made}, found one of {found} by its dim_mult, temperal_downsample, "
                "patch_size and is_residual"
            )
        return cls(
            channels,
            fields.integer("decoder_base_dim", fields.integer("base_dim", 96)),
            tuple(widths),
            blocks,
            tuple(downsample),
            residual,
            patch,
        )

    def cache_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """The last two frames [2, C, h, w] that went into each causal convolution of more than one tap, in order."""
        widths = [self.base_dim * factor for factor in (self.dim_mult[-1], *reversed(self.dim_mult))]
        shapes = [(2, self.z_dim, height, width)] + 4 * [(2, widths[0], height, width)]
        channels, last = widths[0], len(self.dim_mult) - 1
        for index, out in enumerate(widths[1:]):
            for _ in range(self.num_res_blocks + 1):
                shapes += [(2, channels, height, width), (2, out, height, width)]
                channels = out
            if index < last:
                if self.temperal_downsample[-1 - index]:
                    shapes.append((2, out, height, width))
                channels, height, width = out if self.is_residual else out // 2, 2 * height, 2 * width
        return [*shapes, (2, channels, height, width)]

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def _check_statistics(fields: Fields, channels: int) -> None:
    """The latents' mean and deviation, where they are written, must be those of a number of channels."""
    for name, expected, inside in (
        ("latents_mean", "numbers", lambda value: True),
        ("latents_std", "numbers above 0", lambda value: value > 0),
    ):
        if fields.document.get(name) is not None:
            numbers = fields.numbers(name)
            if len(numbers) != channels or not all(map(inside, numbers)):
                raise fields.wrong(name, f"{channels} {expected}")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(type(n) is int and 0 < n < 1024 for n in value)
