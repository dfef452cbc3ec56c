"""What a pyramid is: its stages, their latent shapes and token grids, its frame groups and levels.

A plain model is a pyramid of one stage, and a PPF model one that halves no axis but changes its patch size from
stage to stage; both have gain 1, so that global and natural levels coincide.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import UsageError
from .levels import down, gain
from .wavelets import Taps

__all__ = ["AXES", "KINDS", "FrameGroup", "Pyramid", "Resolution", "Stage"]

KINDS = ("pyramidal", "ppf", "plain")
AXES = {"T": 1, "H": 2, "W": 3}
"""Axis of each letter in a latent [C, T, H, W]."""

VAE_TEMPORAL, VAE_SPATIAL = 4, 8
"""Compression of Wan2.1's VAE; its first latent frame is one pixel frame."""


@dataclass(frozen=True)
class Resolution:
    """Size of a video in pixels."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """From "81x448x832".

        Raises:
            UsageError: the text is not three positive numbers.
        """
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 7 and int(part) > 0 for part in parts):
            raise UsageError(f"a resolution is FRAMESxHEIGHTxWIDTH such as 81x448x832, found '{text:.60}'")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class FrameGroup:
    """Latent frames that share a gain: the same axes are halved for all of them."""

    name: str
    frames: slice
    axes: tuple[int, ...]

    @property
    def gain(self) -> float:
        """ω of one scale."""
        return gain(len(self.axes))

    def global_level(self, stage: int, level: float) -> float:
        """σ at the scale of `stage` of a natural level (supplement eq. 17, inverted)."""
        return down(self.gain**stage, level)


@dataclass(frozen=True)
class Stage:
    """One scale. Stage 0 is the finest; sampling runs from the coarsest to 0."""

    index: int
    latent: tuple[int, int, int, int]
    """Shape [C, T, H, W] of the latent."""
    patch_size: tuple[int, int, int]
    grid: tuple[int, int, int]
    """Tokens along T, H and W; RoPE is indexed by it, from 0."""
    clean: float
    """Natural level at which the stage ends."""
    noisy: float
    """Natural level at which the stage starts."""

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Pyramid:
    """The facts of a model that sampling depends on.

    Raises:
        UsageError: the levels don't increase from 0, or the resolution does not fit the stages.
    """

    kind: str
    clean_levels: tuple[float, ...]
    """ς_c of each stage, finest first."""
    resolution: Resolution
    patch_sizes: tuple[tuple[int, int, int], ...]
    """Per stage, finest first."""
    taps: Taps
    axes: str = "THW"
    """Axes halved from one stage to the next; empty for PPF and plain models."""
    first_frame_apart: bool = True
    channels: int = 16

    def __post_init__(self) -> None:
        """Check what later code relies on."""
        levels = self.clean_levels
        increasing = all(a < b for a, b in zip(levels, (*levels[1:], 1.0), strict=True))
        if not levels or levels[0] != 0 or not increasing:
            raise UsageError(f"clean levels start at 0 and increase, below 1, finest stage first; found {list(levels)}")
        self._check_resolution()

    @property
    def depth(self) -> int:
        """Number of stages S."""
        return len(self.clean_levels)

    @cached_property
    def groups(self) -> tuple[FrameGroup, ...]:
        """Frame groups in the order in which they are renoised: first frame, then the rest."""
        axes = tuple(AXES[letter] for letter in "THW" if letter in self.axes)
        if not self.first_frame_apart:
            return (FrameGroup("all", slice(0, None), axes),)
        spatial = tuple(axis for axis in axes if axis != AXES["T"])
        first = FrameGroup("first", slice(0, 1), spatial)
        return (first, FrameGroup("rest", slice(1, None), axes)) if self.latent_frames > 1 else (first,)

    @property
    def latent_frames(self) -> int:
        """Latent frames of stage 0."""
        return (self.resolution.frames - 1) // VAE_TEMPORAL + 1

    @property
    def schedule_gain(self) -> float:
        """ω that spaces the schedules: that of the group which halves most axes; 2·sqrt(2) for PPF."""
        return gain(len(self.axes) if self.kind == "pyramidal" else 3)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, finest first."""
        return tuple(self._stage(index) for index in range(self.depth))

    def at(self, resolution: Resolution) -> "Pyramid":
        """The same model at another resolution."""
        return replace(self, resolution=resolution)

    def _stage(self, index: int) -> Stage:
        scale = {letter: 2**index if letter in self.axes else 1 for letter in "THW"}
        apart = self.first_frame_apart
        frames = (self.latent_frames - apart) // scale["T"] + apart
        height = self.resolution.height // VAE_SPATIAL // scale["H"]
        width = self.resolution.width // VAE_SPATIAL // scale["W"]
        patch = self.patch_sizes[index]
        grid = tuple(-(-size // p) for size, p in zip((frames, height, width), patch, strict=True))
        return Stage(
            index=index,
            latent=(self.channels, frames, height, width),
            patch_size=patch,
            grid=(grid[0], grid[1], grid[2]),
            clean=self.clean_levels[index],
            noisy=self.clean_levels[index + 1] if index + 1 < self.depth else 1.0,
        )

    def _check_resolution(self) -> None:
        size, coarsest = self.resolution, 2 ** (self.depth - 1)
        factor = {letter: coarsest if letter in self.axes else 1 for letter in "THW"}
        for name, pixels, patch, letter in (
            ("height", size.height, self.patch_sizes[0][1], "H"),
            ("width", size.width, self.patch_sizes[0][2], "W"),
        ):
            multiple = VAE_SPATIAL * patch * factor[letter]
            if pixels % multiple:
                raise UsageError(
                    f"impossible resolution {size}: {name} of a {self.kind} model with {self.depth} stage(s) is a "
                    f"multiple of {multiple}, found {pixels}; nearest: {_nearest(pixels, multiple)}"
                )
        if (size.frames - 1) % VAE_TEMPORAL:
            raise UsageError(
                f"impossible resolution {size}: the number of frames is 1 + {VAE_TEMPORAL}k, found {size.frames}; "
                f"nearest: {1 + _nearest(size.frames - 1, VAE_TEMPORAL, 0)}"
            )
        halved = self.latent_frames - self.first_frame_apart
        if factor["T"] > 1 and (halved == 0 or halved % factor["T"]):
            period = VAE_TEMPORAL * factor["T"]
            offset = 1 if self.first_frame_apart else 1 - VAE_TEMPORAL
            raise UsageError(
                f"impossible resolution {size}: the number of frames of a {self.kind} model with {self.depth} stages is "
                f"{period}k{offset:+d} with k >= 1, found {size.frames}; "
                f"nearest: {_nearest(size.frames - offset, period) + offset}"
            )
        if self.kind == "pyramidal" and self.depth > 1 and size.frames == 1:
            raise UsageError(f"impossible resolution {size}: a pyramid of {self.depth} stages has more than one frame")
        for stage in self.stages if self.kind != "ppf" else ():
            if any(n % p for n, p in zip(stage.latent[1:], stage.patch_size, strict=True)):
                raise UsageError(
                    f"impossible resolution {size}: the latent {list(stage.latent)} of stage {stage.index} is not divisible "
                    f"by the patch size {list(stage.patch_size)}"
                )


def _nearest(value: int, multiple: int, least: int = 1) -> int:
    return max(round(value / multiple), least) * multiple
