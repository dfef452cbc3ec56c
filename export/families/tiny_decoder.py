"""The tiny decoder (TAEHV) as two graphs over single latent frames, and its reference over a whole latent."""

from typing import Any

import torch
from torch import nn

from ...runtime.bundle.graphs import Decoder
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.families import TinyDecoderConfig
from ...runtime.quantisation import DECODERS, Recipe
from ...targets.dialect import Dialect
from ..weights.edits import read_tensor
from ..weights.steps import TORCH_DTYPES
from .frames import Conv2d, DoublingConv, PackedCaches, interleaved
from .layers import WeightSpace, run_time_zero

__all__ = ["TINY_MODULES", "TinyDecoder"]

LIMIT = 3.0
"""Latents are drawn smoothly into ± this."""

Frames = list[torch.Tensor]
"""Frames [1, C, H, W], in order of time."""


class MemoryBlock(nn.Module):
    """Three convolutions of a frame beside the one before it, around it: relu(c(relu(c(relu(c([x, before]))))) + x)."""

    def __init__(self, space: WeightSpace, layers: tuple[str, ...]) -> None:
        """The weights of the convolutions, by their names."""
        super().__init__()
        self.convolutions = nn.ModuleList(Conv2d(space, layer) for layer in layers)

    def forward(self, frames: Frames, before: torch.Tensor) -> Frames:
        """As many frames as are given; `before` is the block's own input one frame earlier."""
        return [self._one(frame, old) for frame, old in zip(frames, [before, *frames], strict=False)]

    def _one(self, frame: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        first, second, third = self.convolutions
        x = torch.relu(first(torch.cat((frame, before), dim=1)))
        return torch.relu(third(torch.relu(second(x))) + frame)


class TinyGraph(nn.Module):
    """The decoder's graph for one latent frame.

    Inputs: latent frame [1, C, h, w] as the transformer leaves it, then caches; outputs: frames [n, 3, H, W] in
    -1 … 1, caches. Of the frames that the first latent frame makes, the last one alone is one of the video.
    """

    def __init__(self, space: WeightSpace, config: TinyDecoderConfig, caches: str, *, first: bool) -> None:
        """The decoder of a configuration, for the first latent frame or a later one, its caches in a dtype."""
        super().__init__()
        self.first, self.caches, self.patch = first, TORCH_DTYPES[caches], config.patch_size
        self.conv_in = Conv2d(space, config.first_layer)
        self.blocks = nn.ModuleList(MemoryBlock(space, block) for level in config.levels for block in level.blocks)
        self.growths = nn.ModuleList(Conv2d(space, level.growth) for level in config.levels)
        self.narrowings = nn.ModuleList(DoublingConv(space, level.narrowing) for level in config.levels)
        self.conv_out = Conv2d(space, config.last_layer)

    def forward(self, latent: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Frames, then the new caches."""
        frames, new = [torch.relu(self.conv_in(torch.tanh(latent / LIMIT) * LIMIT))], list[torch.Tensor]()
        each = len(self.blocks) // len(self.growths)
        for level, (growth, narrowing) in enumerate(zip(self.growths, self.narrowings, strict=True)):
            for block in self.blocks[level * each : (level + 1) * each]:
                before = run_time_zero(frames[0]) if self.first else caches[len(new)].float()
                new.append(frames[-1].to(self.caches))
                frames = block(frames, before)
            # Before the doubling and not after it, as in the checkpoint: the same values from a quarter of the work.
            frames = [part for frame in frames for part in growth(frame).split(frame.shape[1], dim=1)]
            if self.first and level == len(self.growths) - 1:
                frames = frames[-1:]
            frames = [narrowing(frame) for frame in frames]
        made = [self._pixels(self.conv_out(torch.relu(frame))) for frame in frames]
        out = made[0] if len(made) == 1 else torch.cat(made, dim=0)
        return out.clamp(0.0, 1.0) * 2.0 - 1.0, *new

    def _pixels(self, frame: torch.Tensor) -> torch.Tensor:
        """Rows of a patch before its columns, as PyTorch's pixel shuffle has them."""
        if self.patch == 1:
            return frame
        height, width = frame.shape[2:]
        return interleaved(frame.reshape(-1, self.patch, self.patch, height, width), height, width)


class TinyDecoder(nn.Module):
    """The decoder over all frames at once, its tensors named as in its file: the reference, in plain PyTorch."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        """The decoder of a configuration, its weights not yet set."""
        super().__init__()
        layers: list[nn.Module] = [Limit(), nn.Conv2d(config.channels, config.widths[0], 3, padding=1), nn.ReLU()]
        for index, (width, following) in enumerate(zip(config.widths, config.widths[1:], strict=False)):
            layers += [Memory(width) for _ in config.levels[index].blocks]
            layers += [nn.Upsample(scale_factor=2), Growth(config, index)]
            layers += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
        colours = 3 * config.patch_size**2
        layers += [nn.ReLU(), nn.Conv2d(config.widths[-1], colours, 3, padding=1), nn.PixelShuffle(config.patch_size)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Frames [1 + 4(T - 1), 3, H, W] in 0 … 1 of a latent [T, C, h, w]."""
        frames: torch.Tensor = self.decoder(latent)
        return frames[len(frames) // len(latent) - 1 :].clamp(0, 1)


class Limit(nn.Module):
    """tanh(x / 3) · 3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return torch.tanh(x / LIMIT) * LIMIT


class Memory(nn.Module):
    """See `MemoryBlock`: over frames [T, C, H, W], zeros before the first."""

    def __init__(self, width: int) -> None:
        """A block of a width."""
        super().__init__()
        first, *others = (nn.Conv2d(given, width, 3, padding=1) for given in (2 * width, width, width))
        self.conv = nn.Sequential(first, *(layer for conv in others for layer in (nn.ReLU(), conv)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return torch.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class Growth(nn.Module):
    """Channels of a frame to frames, in order."""

    def __init__(self, config: TinyDecoderConfig, level: int) -> None:
        """The growth of a level."""
        super().__init__()
        self.width = config.widths[level]
        rows, *_ = config.tensors()[f"{config.levels[level].growth}.weight"]
        self.conv = nn.Conv2d(self.width, rows, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Frames [T, C, H, W] to [kT, C, H, W]."""
        return self.conv(x).reshape(-1, self.width, *x.shape[2:])


class TinyModules:
    """The tiny decoder's half in PyTorch; see `families.DecoderModules`."""

    def decoder_graph(
        self, checkpoint: Checkpoint, decoder: Decoder, recipe: Recipe, dialect: Dialect, *, first: bool
    ) -> nn.Module:
        """The module of a graph, its caches apart or packed."""
        space = WeightSpace(decoder.component, checkpoint.tiny_decoder, recipe, dialect)
        config = _config(checkpoint)
        graph = TinyGraph(space, config, decoder.caches, first=first)
        return PackedCaches(graph, config.cache_shapes(*decoder.tiles.tile)) if decoder.packed else graph

    def load_decoder(self, checkpoint: Checkpoint) -> TinyDecoder:
        """The reference in float32."""
        with torch.device("meta"):
            decoder = TinyDecoder(_config(checkpoint))
        tensors = {name: read_tensor(entry) for name, entry in checkpoint.tiny_decoder.items()}
        decoder.load_state_dict(tensors, assign=True)
        return decoder.eval().requires_grad_(False)

    def decode(self, decoder: Any, latent: torch.Tensor) -> torch.Tensor:
        """Video [3, T, H, W] in -1 … 1 of a latent [C, T, h, w] as the transformer leaves it."""
        video: torch.Tensor = decoder(latent.transpose(0, 1)) * 2 - 1
        return video.transpose(0, 1)


def _config(checkpoint: Checkpoint) -> TinyDecoderConfig:
    config = checkpoint.model.decoders[DECODERS["tiny"]]
    assert isinstance(config, TinyDecoderConfig)
    return config


TINY_MODULES = TinyModules()
