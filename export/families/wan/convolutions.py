"""Convolutions of Wan's decoder over single frames, and the caches that causal ones keep.

Each 3x3x3 convolution is written as three 3x3 ones over single frames: exact, leaner than a 3-D convolution, and
the form that every engine runs. A cache is the convolution's input of the last two frames.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ....runtime.quantisation import Scheme
from ....runtime.ranges import output_of
from ..frames import Conv2d, DoublingConv
from ..layers import WeightSpace

__all__ = ["Caches", "Frames", "apart_if_large", "causal_convolution", "convolution", "doubling_convolution"]

Frames = list[torch.Tensor]
"""Frames [1, C, H, W], in order of time; or, where all are small, one tensor [n, C, H, W] of them."""


@dataclass(frozen=True)
class Filtering:
    """Winograd's minimal filtering along time, F(m, 3): A((Gg) · (Bd)) is the convolution of m + 2 frames d with three
    taps g (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308, sections 4.1 and 4.3).
    """

    inputs: tuple[tuple[float, ...], ...]
    """B."""
    taps: tuple[tuple[float, ...], ...]
    """G."""
    outputs: tuple[tuple[float, ...], ...]
    """A."""


FILTERS = {
    4: Filtering(
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    6: Filtering(
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}
"""By the frames that go in: two come out of four, by four convolutions in place of six, and four of six, by six in
place of twelve. In float32 they differ from the convolution by some 7e-7, three times as much as it does itself."""


TOGETHER = 2**21
"""Most bytes that frames take which are computed on together: fewer operators, each of which counts where they are
small; where they are large, more memory at once."""


def count_of(frames: Frames) -> int:
    """How many there are, in one tensor or in several."""
    return sum(len(frame) for frame in frames)


def apart_if_large(frames: Frames, growth: float) -> Frames:
    """In one tensor each, unless all of them, so many times as large, can be computed on together."""
    together = len(frames) == 1 and count_of(frames) + 2 in FILTERS and 4 * growth * frames[0].numel() <= TOGETHER
    return frames if together else [one for frame in frames for one in (frame.split(1) if len(frame) > 1 else [frame])]


class Caches:
    """Walks through the caches in the order of the layers, reading the old ones and collecting the new."""

    def __init__(self, old: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Caches [2, C, H, W] of the frame before, empty for the first frame; the new ones are kept in a dtype."""
        self.old, self.new, self.dtype = old, list[torch.Tensor](), dtype

    def extend(self, frames: Frames) -> Frames:
        """The two frames before, if there are any, then the given ones; remembers the last two of all."""
        if self.old:
            before = self._before()
            frames = [before[0:1], before[1:2], *frames]
            self._remember(frames)
        else:
            # Nothing lies before the first frame: its taps into the past are left out, not computed on zeros.
            self.new.append(nn.functional.pad(frames[0], (0, 0, 0, 0, 0, 0, 1, 0)).to(self.dtype))
        return frames

    def together(self, frames: Frames) -> torch.Tensor:
        """The two frames before, then the given ones, of which there are two or more, [n, C, H, W]."""
        before = self._before()
        self._remember(frames)
        return torch.cat((before, *frames), dim=0)

    def _before(self) -> torch.Tensor:
        return self.old[len(self.new)].float()

    def _remember(self, frames: Frames) -> None:
        last = frames[0][-2:] if len(frames) == 1 else torch.cat(frames[-2:], dim=0)
        self.new.append(last.to(self.dtype))

    def skip(self, like: torch.Tensor) -> None:
        """A layer that the first frame bypasses: its cache is zero."""
        self.new.append(like.new_zeros((2, *like.shape[1:]), dtype=self.dtype))


class CausalConv(nn.Module):
    """A causal convolution of three taps in time."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.convolution = space.dialect.convolution
        self.taps = nn.ParameterList(space.kernel(name, tap) for tap in range(3))
        self.bias = space.vector(f"{name}.bias")
        self.filters = space.dialect.minimal_filtering

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """The convolved frames, as many as are given."""
        if caches.old and self.filters and count_of(frames) + 2 in FILTERS:
            made = self._filtered(caches.together(frames))
            return [made] if len(frames) == 1 else list(made.split(1))
        frames = caches.extend(frames)
        old, middle, new = self.taps
        padding = new.shape[-1] // 2
        if not caches.old:
            return [self.convolution(frame, new, self.bias, padding) for frame in frames]
        return [
            self.convolution(c, new, self.bias, padding)
            + self.convolution(b, middle, None, padding)
            + self.convolution(a, old, None, padding)
            for a, b, c in zip(frames, frames[1:], frames[2:], strict=False)
        ]

    def _filtered(self, frames: torch.Tensor) -> torch.Tensor:
        """The same by one convolution for each frame that goes in, in place of three for each that comes out."""
        count, channels, *size = frames.shape
        filtering, taps = FILTERS[count], torch.cat([tap.float() for tap in self.taps])
        mixed = (_matrix(filtering.inputs) @ frames.flatten(1)).reshape(1, count * channels, *size)
        kernels = (_matrix(filtering.taps) @ taps.reshape(3, -1)).reshape(-1, *taps.shape[1:])
        # The second of them is a part of every frame that comes out, and so is its bias.
        bias = nn.functional.pad(self.bias, (len(self.bias), (count - 2) * len(self.bias)))
        made = nn.functional.conv2d(mixed, kernels, bias, padding=taps.shape[-1] // 2, groups=count)
        out = _matrix(filtering.outputs) @ made.reshape(count, -1)
        return out.reshape(count - 2, len(self.bias), *size)


class IntegerConv(nn.Module):
    """A convolution of 8-bit integers that keeps the size: a recipe says what its input and its output range over."""

    def __init__(self, space: WeightSpace, name: str, scheme: Scheme) -> None:
        """The weights of NAME."""
        super().__init__()
        self.dialect = space.dialect
        self.values, self.scales = space.integer_kernel(name, scheme)
        self.bias = space.vector(f"{name}.bias")
        self.scale, self.zero = space.input_range(name)
        self.output_scale, self.output_zero = space.input_range(output_of(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution: x [n, in, H, W] to [n, out, H, W]."""
        return self.convolve(self.rounded(x))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The integers of an input."""
        return self.dialect.rounded_integers(x, self.scale, self.zero)

    def convolve(self, integers: torch.Tensor) -> torch.Tensor:
        """The convolution of an input's integers."""
        given, made = (self.scale, self.zero), (self.output_scale, self.output_zero)
        padding = self.values.shape[-1] // 2
        return self.dialect.integer_convolution(integers, given, self.values, self.scales, self.bias, made, padding)


class IntegerDoublingConv(IntegerConv):
    """A convolution of 8-bit integers over a frame whose pixels are first repeated twice along both axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution: x [1, in, H, W] to [1, out, 2H, 2W]."""
        return super().forward(self.dialect.doubling()(x))


class IntegerCausalConv(IntegerConv):
    """A causal convolution of three taps in time: the frames that it sees lie side by side as channels."""

    def forward(self, frames: Frames, caches: Caches) -> Frames:  # type: ignore[override]
        """The convolved frames, as many as are given."""
        if len(frames[0]) > 1:
            x = self.rounded(caches.together(frames))
            return [self.convolve(torch.cat((x[:-2], x[1:-1], x[2:]), dim=1))]
        frames = [self.rounded(frame) for frame in caches.extend(frames)]
        if not caches.old:
            nothing = self.zero.expand(frames[0].shape)
            frames = [nothing, nothing, *frames]
        return [
            self.convolve(torch.cat((a, b, c), dim=1)) for a, b, c in zip(frames, frames[1:], frames[2:], strict=False)
        ]


def _matrix(rows: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def convolution(space: WeightSpace, name: str) -> nn.Module:
    """A convolution over one frame, as the recipe says."""
    scheme = space.recipe.scheme(name)
    tap = 0 if len(space.tensors[f"{name}.weight"].shape) == 5 else None
    return Conv2d(space, name, tap) if scheme.is_float else IntegerConv(space, name, scheme)


def doubling_convolution(space: WeightSpace, name: str) -> nn.Module:
    """A convolution of a frame whose pixels are first repeated, as the recipe says."""
    scheme = space.recipe.scheme(name)
    return DoublingConv(space, name) if scheme.is_float else IntegerDoublingConv(space, name, scheme)


def causal_convolution(space: WeightSpace, name: str) -> nn.Module:
    """A causal convolution, as the recipe says."""
    scheme = space.recipe.scheme(name)
    return CausalConv(space, name) if scheme.is_float else IntegerCausalConv(space, name, scheme)
