"""What a pyramid is: its stages at a resolution, their latent shapes and token grids, its frame groups and levels.

A plain model is a pyramid of one stage, and a PPF model one that halves no axis but changes its patch size from
stage to stage; both have gain 1, so that global and natural levels coincide. A pyramid has no size of its own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UsageError
from .clock import Clock
from .kinds import Kind
from .levels import down, gain, up
from .wavelets import Taps

__all__ = ["AXES", "FrameGroup", "Geometry", "Pyramid", "Resolution", "Stage"]

AXES = {"T": 1, "H": 2, "W": 3}
"""Axis of each letter in a latent [C, T, H, W]."""

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class Resolution:
    """Size of a video in pixels."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """Read a resolution such as "81x448x832".

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
class Geometry:
    """Latents of a family: their channels, and pixels per latent pixel. The first latent frame is one pixel frame."""

    channels: int = 16
    temporal: int = 4
    spatial: int = 8

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a number of pixel frames."""
        return (frames - 1) // self.temporal + 1


@dataclass(frozen=True)
class FrameGroup:
    """Latent frames that share a gain: the same axes are halved for all of them."""

    name: str
    start: int
    stop: int | None
    axes: tuple[int, ...]

    @property
    def frames(self) -> slice:
        """The group's latent frames."""
        return slice(self.start, self.stop)

    @property
    def gain(self) -> float:
        """ω of one scale."""
        return gain(len(self.axes))

    def global_level(self, stage: int, level: float) -> float:
        """σ at the scale of `stage` of a natural level (supplement eq. 17, inverted)."""
        return down(self.gain**stage, level)


@dataclass(frozen=True)
class Stage:
    """One scale at a resolution. Stage 0 is the finest; sampling runs from the coarsest to 0."""

    index: int
    latent: tuple[int, int, int, int]
    """Shape [C, T, H, W] of the latent."""
    patch_size: Patch
    grid: Patch
    """Tokens along T, H and W; RoPE is indexed by it, from 0."""
    clean: float
    """Natural level at which the stage ends."""
    noisy: float
    """Natural level at which the stage starts."""
    groups: tuple[FrameGroup, ...]
    """Its frame groups in the order in which they are renoised: first frame, then the rest."""

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return math.prod(self.grid)

    @property
    def whole(self) -> tuple[int, int, int, int]:
        """Shape [C, T, H, W] of the finest stage's latent, whose frames are all halved alike, or not at all."""
        axes = self.groups[-1].axes
        channels, *sizes = self.latent
        t, h, w = (size << self.index if axis in axes else size for axis, size in zip((1, 2, 3), sizes, strict=True))
        return channels, t, h, w


@dataclass(frozen=True)
class Pyramid:
    """The facts of a model that sampling depends on, whatever the resolution.

    Raises:
        UsageError: the levels don't increase from 0.
    """

    kind: Kind
    clean_levels: tuple[float, ...]
    """ς_c of each stage, finest first."""
    patch_sizes: tuple[Patch, ...]
    """Patch size of each stage, finest first."""
    taps: Taps
    axes: str = "THW"
    """Axes halved from one stage to the next; empty for PPF and plain models."""
    first_frame_apart: bool = True
    geometry: Geometry = Geometry()
    boundary: float | None = None
    """Of a model of two networks: the timestep, over 1000, below which the second one evaluates (Wan2.2-A14B)."""
    clock: Clock | None = None
    """Of stages that have one of their own."""

    def __post_init__(self) -> None:
        """Check what later code relies on."""
        levels = self.clean_levels
        increasing = all(a < b for a, b in zip(levels, (*levels[1:], 1.0), strict=True))
        if not levels or levels[0] != 0 or not increasing:
            raise UsageError(f"clean levels start at 0 and increase, below 1, finest stage first; found {list(levels)}")
        if (self.clock is not None) != self.kind.clocked:
            raise UsageError(f"a {self.kind.name} model has {'a' if self.kind.clocked else 'no'} clock of its stages")
        if self.clock is not None:
            self.clock.check(len(levels))
            if self.first_frame_apart:
                raise UsageError("stages with clocks take all frames alike: first_frame is joint, found separate")
            if self.boundary is not None:
                raise UsageError(f"stages with clocks are one network: leave out boundary_ratio, found {self.boundary}")

    @property
    def depth(self) -> int:
        """Number of stages S."""
        return len(self.clean_levels)

    def bounds(self, index: int) -> tuple[float, float]:
        """Natural levels ς_n and ς_c, at which a stage starts and ends."""
        return (*self.clean_levels, 1.0)[index + 1], self.clean_levels[index]

    def rho(self, index: int, level: float) -> float:
        """ρ of a natural level in a stage: 1 where it starts, 0 where it ends, linear in its global level."""
        k = self.schedule_gain**index
        noisy, clean = (down(k, bound) for bound in self.bounds(index))
        return (down(k, level) - clean) / (noisy - clean)

    def level(self, index: int, rho: float) -> float:
        """The natural level of a ρ: the inverse of `rho`."""
        k = self.schedule_gain**index
        noisy, clean = (down(k, bound) for bound in self.bounds(index))
        return up(k, clean + rho * (noisy - clean))

    def timestep(self, index: int, level: float) -> float:
        """What the network is told of a natural level in a stage."""
        return self.kind.timestep(level) if self.clock is None else self.clock.timestep(index, self.rho(index, level))

    def shifted(self, index: int, level: float, tokens: int) -> float:
        """A schedule's natural level in a stage, moved as the clock moves it after a stage of so many tokens."""
        if self.clock is None:
            return level
        return self.level(index, self.clock.shifted(self.rho(index, level), tokens))

    def sigmas(self, stage: "Stage", level: float, after: float) -> tuple[tuple[float, float], ...]:
        """What a velocity is the derivative by, of each frame group, at a natural level and at the next.

        The group's global level at the stage's scale, or ρ where stages have clocks.
        """
        if self.clock is not None:
            return tuple((self.rho(stage.index, level), self.rho(stage.index, after)) for _ in stage.groups)
        return tuple(
            (group.global_level(stage.index, level), group.global_level(stage.index, after)) for group in stage.groups
        )

    def expert(self, timestep: float) -> int:
        """Index of the network that evaluates a timestep, as diffusers' `WanPipeline` chooses it."""
        return int(self.boundary is not None and timestep < 1000 * self.boundary)

    def experts(self, index: int) -> tuple[int, ...]:
        """Indices of the networks that a stage can need."""
        ends = (self.expert(self.kind.timestep(level)) for level in self.bounds(index))
        return tuple(sorted(set(ends)))

    @property
    def schedule_gain(self) -> float:
        """ω that spaces the schedules: that of the group which halves most axes; 2·sqrt(2) for PPF."""
        return gain(len(self.axes) if self.kind.schedule_axes is None else self.kind.schedule_axes)

    def stages(self, resolution: Resolution) -> tuple[Stage, ...]:
        """The stages at a resolution, finest first.

        Raises:
            UsageError: the resolution does not fit them; the message says what is nearest.
        """
        return _stages(self, resolution)

    def groups(self, resolution: Resolution) -> tuple[FrameGroup, ...]:
        """Frame groups at a resolution: a video of one latent frame has none but the first."""
        axes = tuple(AXES[letter] for letter in "THW" if letter in self.axes)
        if not self.first_frame_apart:
            return (FrameGroup("all", 0, None, axes),)
        first = FrameGroup("first", 0, 1, tuple(axis for axis in axes if axis != AXES["T"]))
        many = self.geometry.latent_frames(resolution.frames) > 1
        return (first, FrameGroup("rest", 1, None, axes)) if many else (first,)


@lru_cache(maxsize=64)
def _stages(pyramid: Pyramid, resolution: Resolution) -> tuple[Stage, ...]:
    _check_resolution(pyramid, resolution)
    stages = tuple(_stage(pyramid, resolution, index) for index in range(pyramid.depth))
    for stage in () if pyramid.kind.resizes else stages:
        if any(n % p for n, p in zip(stage.latent[1:], stage.patch_size, strict=True)):
            raise UsageError(
                f"impossible resolution {resolution}: the latent {list(stage.latent)} of stage {stage.index} is not "
                f"divisible by the patch size {list(stage.patch_size)}"
            )
    return stages


def _stage(pyramid: Pyramid, resolution: Resolution, index: int) -> Stage:
    scale = {letter: 2**index if letter in pyramid.axes else 1 for letter in "THW"}
    geometry, apart = pyramid.geometry, pyramid.first_frame_apart
    frames = (geometry.latent_frames(resolution.frames) - apart) // scale["T"] + apart
    height = resolution.height // geometry.spatial // scale["H"]
    width = resolution.width // geometry.spatial // scale["W"]
    patch = pyramid.patch_sizes[index]
    t, h, w = (-(-size // p) for size, p in zip((frames, height, width), patch, strict=True))
    noisy, clean = pyramid.bounds(index)
    latent = (geometry.channels, frames, height, width)
    return Stage(index, latent, patch, (t, h, w), clean, noisy, pyramid.groups(resolution))


def _check_resolution(pyramid: Pyramid, size: Resolution) -> None:
    kind, geometry = pyramid.kind, pyramid.geometry
    factor = {letter: 2 ** (pyramid.depth - 1) if letter in pyramid.axes else 1 for letter in "THW"}
    for name, pixels, patch, letter in (
        ("height", size.height, pyramid.patch_sizes[0][1], "H"),
        ("width", size.width, pyramid.patch_sizes[0][2], "W"),
    ):
        multiple = geometry.spatial * patch * factor[letter]
        if pixels % multiple:
            raise UsageError(
                f"impossible resolution {size}: {name} of a {kind.name} model with {pyramid.depth} stage(s) is a "
                f"multiple of {multiple}, found {pixels}; nearest: {_nearest(pixels, multiple)}"
            )
    if (size.frames - 1) % geometry.temporal and factor["T"] == 1:
        raise UsageError(
            f"impossible resolution {size}: the number of frames is 1 + {geometry.temporal}k, found {size.frames}; "
            f"nearest: {1 + _nearest(size.frames - 1, geometry.temporal, 0)}"
        )
    period, offset = geometry.temporal * factor["T"], 1 if pyramid.first_frame_apart else 1 - geometry.temporal
    if factor["T"] > 1 and (size.frames <= offset or (size.frames - offset) % period):
        raise UsageError(
            f"impossible resolution {size}: the number of frames of a {kind.name} model with {pyramid.depth} stages is "
            f"{period}k{offset:+d} with k >= 1, found {size.frames}; "
            f"nearest: {_nearest(size.frames - offset, period) + offset}"
        )
    if kind.halves and pyramid.depth > 1 and size.frames == 1:
        raise UsageError(
            f"impossible resolution {size}: a pyramid of {pyramid.depth} stages has more than one frame, found 1; "
            f"nearest: {1 + geometry.temporal}"
        )


def _nearest(value: int, multiple: int, least: int = 1) -> int:
    return max(round(value / multiple), least) * multiple
