"""Wan's VAE decoder as two graphs over single latent frames: `first`, and `next` with the caches of the one before."""

import math

import torch
from torch import nn

from ....runtime.model.families.wan_decoder import WanDecoderConfig
from ....targets.dialect import Dialect
from ...weights.steps import TORCH_DTYPES
from ..frames import interleaved, pixels
from ..layers import WeightSpace
from .convolutions import Caches, Frames, apart_if_large, causal_convolution, convolution, doubling_convolution

__all__ = ["VaeGraph", "decoder_layer"]


class VaeGraph(nn.Module):
    """The decoder's graph for one latent frame.

    Inputs: latent frame [1, C, h, w] as the transformer leaves it, then caches; outputs: frames [n, 3, H, W], caches.
    The first latent frame makes one frame, a later one four. Frames are clamped to -1 … 1.
    """

    def __init__(self, space: WeightSpace, config: WanDecoderConfig, caches: str, *, first: bool) -> None:
        """The decoder of a configuration, for the first latent frame or a later one, its caches in a dtype."""
        super().__init__()
        self.first, self.caches = first, TORCH_DTYPES[caches]
        self.post_quant = convolution(space, "post_quant_conv")
        self.conv_in = causal_convolution(space, "decoder.conv_in")
        middle = "decoder.mid_block"
        self.mid = nn.ModuleList(
            [
                Residual(space, f"{middle}.resnets.0"),
                SpatialAttention(space, f"{middle}.attentions.0"),
                Residual(space, f"{middle}.resnets.1"),
            ]
        )
        self.up, self.shortcuts = nn.ModuleList(), list[Shortcut | None]()
        for level in range(len(config.dim_mult)):
            block = f"decoder.up_blocks.{level}"
            self.up.extend(Residual(space, f"{block}.resnets.{n}") for n in range(config.num_res_blocks + 1))
            upsampler = f"{block}.upsampler" if config.is_residual else f"{block}.upsamplers.0"
            enlarges = f"{upsampler}.resample.1.weight" in space.tensors
            if enlarges:
                self.up.append(Upsample(space, upsampler))
            around = enlarges and config.is_residual
            self.shortcuts.append(Shortcut(config, level, space.dialect) if around else None)
        self.layers_of_level, self.patch = config.num_res_blocks + 2, config.patch_size
        self.norm_out, self.silu = ChannelNorm(space, "decoder.norm_out"), space.dialect.silu
        self.conv_out = causal_convolution(space, "decoder.conv_out")

    def forward(self, latent: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Frames, then the new caches."""
        walk = Caches(list(caches), self.caches)
        frames = self.conv_in([self.post_quant(latent)], walk)
        for layer in self.mid:
            frames = layer(frames, walk)
        for level, shortcut in enumerate(self.shortcuts):
            before = frames
            for layer in self.up[level * self.layers_of_level :][: self.layers_of_level]:
                frames = layer(frames, walk)
            if shortcut is not None:
                around = shortcut(before, first=not walk.old)
                around = [torch.cat(around)] if len(around) > len(frames) else around
                frames = [a + b for a, b in zip(frames, around, strict=True)]
        frames = self.conv_out([self.silu(self.norm_out(frame)) for frame in frames], walk)
        frames = [pixels(frame, self.patch) for frame in frames]
        out = frames[0] if len(frames) == 1 else torch.cat(frames, dim=0)
        return out.clamp(-1.0, 1.0), *walk.new


def decoder_layer(config: WanDecoderConfig, name: str) -> str:
    """What a convolution between the decoder's ends, DECODER.BLOCK.LAYER of a checkpoint, is called in `VaeGraph`."""
    _, block, *rest = name.split(".")
    if block == "mid_block":
        kind, index, *leaf = rest
        return ".".join(("mid", str(2 * int(index) if kind == "resnets" else 1), *leaf))
    level, kind, *leaf = rest
    first = int(level) * (config.num_res_blocks + 2)  # of a level: its residual blocks, one more than it says, then up
    if kind == "resnets":
        index, *leaf = leaf
        return ".".join(("up", str(first + int(index)), *(part.removeprefix("conv_") for part in leaf)))
    own = "time_conv" if leaf[-1] == "time_conv" else "conv"
    return f"up.{first + config.num_res_blocks + 1}.{own}"


class ChannelNorm(nn.Module):
    """RMS norm over channels."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The scale of NAME."""
        super().__init__()
        count = space.tensors[f"{name}.gamma"].elements
        self.mean = space.dialect.channel_mean(count)
        self.gamma = space.vector(f"{name}.gamma", (1, count, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [n, C, H, W], of the same shape."""
        return x * torch.rsqrt(self.mean(x * x) + 1e-24) * self.gamma


class Residual(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(space, f"{name}.norm1"), causal_convolution(space, f"{name}.conv1")
        self.norm2, self.conv2 = ChannelNorm(space, f"{name}.norm2"), causal_convolution(space, f"{name}.conv2")
        self.silu, shortcut = space.dialect.silu, f"{name}.conv_shortcut"
        self.shortcut = convolution(space, shortcut) if f"{shortcut}.weight" in space.tensors else None

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """The frames after the block, as many as are given."""
        x = self.conv1([self.silu(self.norm1(frame)) for frame in frames], caches)
        x = self.conv2([self.silu(self.norm2(frame)) for frame in x], caches)
        around = frames if self.shortcut is None else [self.shortcut(frame) for frame in frames]
        return [a + b for a, b in zip(x, around, strict=True)]


class SpatialAttention(nn.Module):
    """Attention of one head over the pixels of each frame."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.norm = ChannelNorm(space, f"{name}.norm")
        self.to_qkv, self.proj = convolution(space, f"{name}.to_qkv"), convolution(space, f"{name}.proj")

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """The frames after attention, as many as are given; it needs no cache."""
        return [frame + self.proj(self._attend(self.to_qkv(self.norm(frame)))) for frame in frames]

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        height, width = qkv.shape[2:]
        pixels, channels = qkv.flatten(2), qkv.shape[1] // 3
        q, k, v = (pixels[:, start : start + channels] for start in range(0, 3 * channels, channels))
        scores = torch.softmax(torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5, dim=-1)
        return torch.bmm(v, scores.transpose(1, 2)).unflatten(2, (height, width))


class Upsample(nn.Module):
    """Twice the size in space and, where there is a `time_conv`, twice the frames; the first frame stays one."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.conv = doubling_convolution(space, f"{name}.resample.1")
        out, into, *_ = space.tensors[f"{name}.resample.1.weight"].shape
        self.together, self.growth = space.dialect.minimal_filtering, 4 * out / into
        time = f"{name}.time_conv"
        self.time_conv = causal_convolution(space, time) if f"{time}.weight" in space.tensors else None

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """Larger frames, and twice as many from the second latent frame on."""
        if self.time_conv is not None:
            if not caches.old:
                caches.skip(frames[0])
            else:
                frames = self._doubled(self.time_conv(frames, caches))
        return [self.conv(frame) for frame in apart_if_large(frames, self.growth)]

    def _doubled(self, both: Frames) -> Frames:
        """Frames [n, 2C, H, W], each of which is two, as twice as many."""
        half, *size = both[0].shape[1] // 2, *both[0].shape[2:]
        if self.together:
            return [frame.reshape(2 * len(frame), half, *size) for frame in both]
        return [part for frame in both for part in (frame[:, :half], frame[:, half:])]


class Shortcut:
    """Around a level of the residual decoder: channels, repeated, laid out as frames and pixels of the larger size."""

    def __init__(self, config: WanDecoderConfig, level: int, dialect: Dialect) -> None:
        """That of a level which doubles its frames in space, and in time where the configuration says so."""
        widths = [config.base_dim * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.given, self.made = widths[level : level + 2]
        self.frames = 2 if config.temperal_downsample[-1 - level] else 1
        self.repeats = 4 * self.frames * self.made // self.given
        self.enlarge = dialect.doubling()

    def __call__(self, frames: Frames, *, first: bool) -> Frames:
        """Larger frames, and where time doubles twice as many; of the first latent frame the later one alone."""
        frames = apart_if_large(frames, math.inf)
        return [part for frame in frames for part in (self._parts(frame)[-1:] if first else self._parts(frame))]

    def _parts(self, frame: torch.Tensor) -> Frames:
        if self.given == self.made:  # every channel is repeated into all of its own pixels
            return [self.enlarge(frame)] * self.frames
        height, width = frame.shape[2:]
        repeated = torch.cat([frame.reshape(self.given, 1, height, width)] * self.repeats, dim=1)
        parts = repeated.reshape(self.made, self.frames, 2, 2, height * width)
        return [
            interleaved(parts[:, index].reshape(self.made, 2, 2, height, width), height, width)
            for index in range(self.frames)
        ]
