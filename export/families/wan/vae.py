"""Wan's VAE decoder as two graphs over single latent frames: `first`, and `next` with the caches of the frame before.

Each 3x3x3 convolution is written as three 3x3 ones over single frames: exact, leaner than a 3-D convolution, and
the form that every engine runs. A cache is the convolution's input of the last two frames.
"""

import math

import torch
from torch import nn

from ....runtime.model.families.wan import WanDecoderConfig
from ....runtime.quantisation import Scheme
from ....runtime.ranges import output_of
from ...weights.steps import TORCH_DTYPES
from ..layers import WeightSpace

__all__ = ["PackedVae", "VaeGraph", "decoder_layer"]

Frames = list[torch.Tensor]
"""Frames [1, C, H, W], in order of time."""


class Caches:
    """Walks through the caches in the order of the layers, reading the old ones and collecting the new."""

    def __init__(self, old: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Caches [2, C, H, W] of the frame before, empty for the first frame; the new ones are kept in a dtype."""
        self.old, self.new, self.dtype = old, list[torch.Tensor](), dtype

    def extend(self, frames: Frames) -> Frames:
        """The two frames before, if there are any, then the given ones; remembers the last two of all."""
        if self.old:
            before = self.old[len(self.new)].float()
            frames = [before[0:1], before[1:2], *frames]
            self.new.append(torch.cat(frames[-2:], dim=0).to(self.dtype))
        else:
            # Nothing lies before the first frame: its taps into the past are left out, not computed on zeros.
            self.new.append(nn.functional.pad(frames[0], (0, 0, 0, 0, 0, 0, 1, 0)).to(self.dtype))
        return frames

    def skip(self, like: torch.Tensor) -> None:
        """A layer that the first frame bypasses: its cache is zero."""
        self.new.append(like.new_zeros((2, *like.shape[1:]), dtype=self.dtype))


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
        self.up = nn.ModuleList()
        for index in range(len(config.dim_mult)):
            block = f"decoder.up_blocks.{index}"
            self.up.extend(Residual(space, f"{block}.resnets.{n}") for n in range(config.num_res_blocks + 1))
            if f"{block}.upsamplers.0.resample.1.weight" in space.tensors:
                self.up.append(Upsample(space, f"{block}.upsamplers.0"))
        self.norm_out = ChannelNorm(space, "decoder.norm_out")
        self.conv_out = causal_convolution(space, "decoder.conv_out")

    def forward(self, latent: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Frames, then the new caches."""
        walk = Caches(list(caches), self.caches)
        frames = self.conv_in([self.post_quant(latent)], walk)
        for layer in (*self.mid, *self.up):
            frames = layer(frames, walk)
        frames = self.conv_out([nn.functional.silu(self.norm_out(frame)) for frame in frames], walk)
        out = frames[0] if len(frames) == 1 else torch.cat(frames, dim=0)
        return out.clamp(-1.0, 1.0), *walk.new


def decoder_layer(config: WanDecoderConfig, name: str) -> str:
    """What a convolution between the decoder's ends, DECODER.BLOCK.LAYER of a checkpoint, is called in `VaeGraph`."""
    _, block, *rest = name.split(".")
    if block == "mid_block":
        kind, index, *leaf = rest
        return ".".join(("mid", str(2 * int(index) if kind == "resnets" else 1), *leaf))
    level, kind, index, *leaf = rest
    first = int(level) * (config.num_res_blocks + 2)  # of a level: its residual blocks, one more than it says, then up
    if kind == "resnets":
        return ".".join(("up", str(first + int(index)), *(part.removeprefix("conv_") for part in leaf)))
    own = "time_conv" if leaf == ["time_conv"] else "conv"
    return f"up.{first + config.num_res_blocks + 1}.{own}"


class PackedVae(nn.Module):
    """A decoder whose caches are one flat tensor, and whose frames and new caches are another."""

    def __init__(self, vae: VaeGraph, shapes: list[tuple[int, ...]]) -> None:
        """The graph of a decoder whose caches have the given shapes."""
        super().__init__()
        self.vae, self.shapes = vae, shapes

    def forward(self, latent: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        """Frames, then the new caches, flat."""
        caches, start = list[torch.Tensor](), 0
        for shape in self.shapes if packed else []:
            count = math.prod(shape)
            caches.append(packed[0][start : start + count].reshape(shape))
            start += count
        return torch.cat([value.flatten() for value in self.vae(latent, *caches)])


class Conv2d(nn.Module):
    """A convolution that keeps the size, over one frame; `tap` picks one of a causal kernel's."""

    def __init__(self, space: WeightSpace, name: str, tap: int | None = None) -> None:
        """The weights of NAME."""
        super().__init__()
        self.convolution = space.dialect.convolution
        self.weight = space.kernel(name, tap)
        self.bias = space.vector(f"{name}.bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution: x [n, in, H, W] to [n, out, H, W]."""
        return self.convolution(x, self.weight, self.bias, self.weight.shape[-1] // 2)


class CausalConv(nn.Module):
    """A causal convolution of three taps in time."""

    def __init__(self, space: WeightSpace, name: str) -> None:
        """The weights of NAME."""
        super().__init__()
        self.convolution = space.dialect.convolution
        self.taps = nn.ParameterList(space.kernel(name, tap) for tap in range(3))
        self.bias = space.vector(f"{name}.bias")

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """The convolved frames, as many as are given."""
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


class IntegerCausalConv(IntegerConv):
    """A causal convolution of three taps in time: the frames that it sees lie side by side as channels."""

    def forward(self, frames: Frames, caches: Caches) -> Frames:  # type: ignore[override]
        """The convolved frames, as many as are given."""
        frames = [self.rounded(frame) for frame in caches.extend(frames)]
        if not caches.old:
            nothing = self.zero.expand(frames[0].shape)
            frames = [nothing, nothing, *frames]
        return [
            self.convolve(torch.cat((a, b, c), dim=1)) for a, b, c in zip(frames, frames[1:], frames[2:], strict=False)
        ]


def convolution(space: WeightSpace, name: str) -> nn.Module:
    """A convolution over one frame, as the recipe says."""
    scheme = space.recipe.scheme(name)
    tap = 0 if len(space.tensors[f"{name}.weight"].shape) == 5 else None
    return Conv2d(space, name, tap) if scheme.is_float else IntegerConv(space, name, scheme)


def causal_convolution(space: WeightSpace, name: str) -> nn.Module:
    """A causal convolution, as the recipe says."""
    scheme = space.recipe.scheme(name)
    return CausalConv(space, name) if scheme.is_float else IntegerCausalConv(space, name, scheme)


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
        shortcut = f"{name}.conv_shortcut"
        self.shortcut = convolution(space, shortcut) if f"{shortcut}.weight" in space.tensors else None

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """The frames after the block, as many as are given."""
        x = self.conv1([nn.functional.silu(self.norm1(frame)) for frame in frames], caches)
        x = self.conv2([nn.functional.silu(self.norm2(frame)) for frame in x], caches)
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
        self.enlarge = space.dialect.doubling()
        self.conv = convolution(space, f"{name}.resample.1")
        time = f"{name}.time_conv"
        self.time_conv = causal_convolution(space, time) if f"{time}.weight" in space.tensors else None

    def forward(self, frames: Frames, caches: Caches) -> Frames:
        """Larger frames, and twice as many from the second latent frame on."""
        if self.time_conv is not None:
            if not caches.old:
                caches.skip(frames[0])
            else:
                both = self.time_conv(frames, caches)
                half = both[0].shape[1] // 2
                frames = [part for frame in both for part in (frame[:, :half], frame[:, half:])]
        return [self.conv(self.enlarge(frame)) for frame in frames]
