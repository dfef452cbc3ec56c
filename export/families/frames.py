"""Layers over video frames, of which decoders are made."""

import math

import torch
from torch import nn

from .layers import WeightSpace

__all__ = ["Conv2d", "DoublingConv", "PackedCaches", "interleaved", "pixels"]

PHASES = (((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)), ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)))
"""Of the second and the first of two pixels that stand for one, along an axis: what the two taps on the pixels before
doubling are of the three on those after it."""


class Conv2d(nn.Module):
    """A convolution that keeps the size, over one frame, with a bias where there is one."""

    def __init__(self, space: WeightSpace, name: str, tap: int | None = None) -> None:
        """The weights of NAME; `tap` picks one of a causal kernel's."""
        super().__init__()
        self.convolution = space.dialect.convolution
        self.weight = space.kernel(name, tap)
        self.bias = space.vector(f"{name}.bias") if f"{name}.bias" in space.tensors else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution: x [n, in, H, W] to [n, out, H, W]."""
        return self.convolution(x, self.weight, self.bias, self.weight.shape[-1] // 2)


class DoublingConv(nn.Module):
    """A 3x3 convolution of a frame whose pixels were each repeated twice along both axes.

    The four pixels that stand for one see it through kernels of 2x2, whose taps are sums: with minimal filtering these
    are used, and the large frame is never made.
    """

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.conv, self.enlarge = Conv2d(space, name), space.dialect.doubling()
        self.filters = space.dialect.minimal_filtering

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        """Frames [n, in, H, W] to [n, out, 2H, 2W]."""
        if not self.filters:
            enlarged: torch.Tensor = self.conv(self.enlarge(frame))
            return enlarged
        (out, into), (height, width) = self.conv.weight.shape[:2], frame.shape[2:]
        along = torch.tensor(PHASES)
        sums = torch.einsum("aip,bjq->pqabij", along, along).reshape(9, 16)
        kernels = (self.conv.weight.float().reshape(-1, 9) @ sums).reshape(out, into, 4, 2, 2)
        kernels = kernels.transpose(1, 2).reshape(4 * out, into, 2, 2)
        bias = None if self.conv.bias is None else self.conv.bias[:, None].expand(-1, 4).reshape(-1)
        made = nn.functional.conv2d(frame, kernels, bias, padding=1)
        # One more row and column than pixels: with the second of two pixels first, those of each lie side by side.
        return nn.functional.pixel_shuffle(made, 2)[:, :, 1 : 1 + 2 * height, 1 : 1 + 2 * width]


class PackedCaches(nn.Module):
    """A decoder's graph whose caches are one flat tensor, and whose frames and new caches are another."""

    def __init__(self, decoder: nn.Module, shapes: list[tuple[int, ...]]) -> None:
        """The module of a decoder's graph, whose caches have the given shapes."""
        super().__init__()
        self.decoder, self.shapes = decoder, shapes

    def forward(self, latent: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        """Frames, then the new caches, flat."""
        caches, start = list[torch.Tensor](), 0
        for shape in self.shapes if packed else []:
            count = math.prod(shape)
            caches.append(packed[0][start : start + count].reshape(shape))
            start += count
        return torch.cat([value.flatten() for value in self.decoder(latent, *caches)])


def interleaved(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels [C, p, p, H, W], rows of a patch before its columns, as [1, C, pH, pW]."""
    channels, patch = x.shape[:2]
    return x.permute(0, 3, 1, 4, 2).reshape(1, channels, patch * height, patch * width)


def pixels(frame: torch.Tensor, patch: int) -> torch.Tensor:
    """Frames [n, C·p², H, W], columns of a patch before its rows, as [n, C, pH, pW] (diffusers' `unpatchify`)."""
    if patch == 1:
        return frame
    height, width = frame.shape[2:]
    made = interleaved(frame.reshape(-1, patch, patch, height, width).transpose(1, 2), height, width)
    return made.reshape(len(frame), -1, patch * height, patch * width)
