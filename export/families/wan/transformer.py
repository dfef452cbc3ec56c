"""The transformer of one stage as a graph: fixed shapes, no scatter, RoPE tables per axis.

Equal to diffusers' `WanTransformer3DModel` up to the order of float32 sums. Kept apart from it because its RoPE and
patch embedding export to operators that engines run badly or not at all.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn

from ....runtime.chain.kinds import Kind
from ....runtime.chain.pyramid import Stage
from ....runtime.model.families.wan import WanConfig
from ....targets.dialect import Dialect
from ..layers import WeightSpace, linear, run_time_zero

__all__ = ["Attention", "RotaryTables", "StageGraph", "modulated", "patchify", "token_chunk", "unpatchify"]


class StageGraph(nn.Module):
    """The graph of a stage.

    Inputs: latent [1, C, T, H, W], timestep features [1, freq_dim], text [1, L, text_dim]; output: velocity, shaped as
    the latent.

    The shapes come from the latent: exported with symbolic ones, the graph of the largest stage is that of all whose
    patch size is the same.
    """

    def __init__(self, space: WeightSpace, config: WanConfig, kind: Kind, stage: Stage) -> None:
        """The graph of one stage, its weights from a transformer's space."""
        super().__init__()
        dialect = space.dialect
        own = f".{stage.index}" if kind.own_patch_layers else ""
        self.config, self.stage, self.gelu, self.folds = config, stage, dialect.gelu, dialect.folds
        self.patch_embedding = linear(space, f"patch_embedding{own}", precise=True)
        self.first_frame_embedding = space.vector("first_frame_embedding") if kind.first_frame_embedding else None
        time = "condition_embedder.time_embedder"
        self.time_1, self.time_2 = (linear(space, f"{time}.linear_{n}", precise=True) for n in (1, 2))
        self.time_proj = linear(space, "condition_embedder.time_proj", precise=True)
        text = "condition_embedder.text_embedder"
        self.text_1, self.text_2 = linear(space, f"{text}.linear_1"), linear(space, f"{text}.linear_2")
        self.blocks = nn.ModuleList(Block(space, config, index) for index in range(config.num_layers))
        self.norm_out = dialect.layer_norm(config.width, config.eps)
        self.scale_shift_table = space.vector("scale_shift_table")
        self.proj_out = linear(space, f"proj_out{own}", precise=True)
        self.rope = RotaryTables(axis_tables(config, stage.grid))
        padded = tuple(n * p for n, p in zip(stage.grid, stage.patch_size, strict=True))
        self.resize = Resize(stage.latent[1:], padded) if padded != stage.latent[1:] else None
        self.restore = Resize(padded, stage.latent[1:]) if padded != stage.latent[1:] else None

    def forward(self, latent: torch.Tensor, timestep_features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The velocity."""
        if self.resize is not None:
            latent = self.resize(latent)
        grid = tuple(n // p for n, p in zip(latent.shape[2:], self.stage.patch_size, strict=True))
        # Tables of all tokens would be stored for each stage, in float32: 16 MB for 30,576 tokens.
        cos, sin = self.rope(grid, run_time_zero(timestep_features[:, :1]) if self.folds else None)
        x = self._embed(latent, grid)
        embedded = self.time_2(nn.functional.silu(self.time_1(timestep_features)))
        modulation = self.time_proj(nn.functional.silu(embedded)).unflatten(1, (6, -1))
        context = self.text_2(self.gelu(self.text_1(text)))
        for block in self.blocks:
            x = block(x, context, modulation, cos, sin)
        table = self.scale_shift_table + embedded.reshape(1, 1, -1)
        x = self.norm_out(x) * (1.0 + table[:, 1:2]) + table[:, 0:1]
        x = unpatchify(self.proj_out(x), grid, self.stage.patch_size, self.config.out_channels)
        return x if self.restore is None else self.restore(x)

    def _embed(self, latent: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        (t, h, w), patches = grid, patchify(latent, grid, self.stage.patch_size)
        if self.first_frame_embedding is None:
            return self.patch_embedding(patches)
        if isinstance(t, int) and t == 1:
            return self.patch_embedding(patches) + self.first_frame_embedding
        # Cut while the channels are few: tokens, cut and joined again, would be held twice.
        first, others = patches[:, : h * w], patches[:, h * w :]
        return torch.cat(
            (self.patch_embedding(first) + self.first_frame_embedding, self.patch_embedding(others)), dim=1
        )


def patchify(latent: torch.Tensor, grid: tuple[int, ...], patch: tuple[int, int, int]) -> torch.Tensor:
    """A latent [1, C, T, H, W] to its patches [1, tokens, C·patch], in five axes at most."""
    (t, h, w), (pt, ph, pw), c = grid, patch, latent.shape[1]
    # In two moves.
    patches = latent.reshape(c, t, pt, h * ph * w * pw).permute(1, 0, 2, 3)
    patches = patches.reshape(t, c * pt, h, ph, w * pw).permute(0, 2, 1, 3, 4)
    return patches.reshape(t * h, c * pt * ph, w, pw).permute(0, 2, 1, 3).reshape(1, t * h * w, c * pt * ph * pw)


def unpatchify(x: torch.Tensor, grid: tuple[int, ...], patch: tuple[int, int, int], channels: int) -> torch.Tensor:
    """What the output projection gives of each token [1, tokens, patch·C] to a latent [1, C, T, H, W]."""
    (t, h, w), (pt, ph, pw), c = grid, patch, channels
    x = x.reshape(t * h, w, pt * ph, pw * c).permute(0, 2, 1, 3)  # [t·h, pt·ph, w, pw·c]
    if pt > 1:
        x = x.reshape(t, h, pt, ph * w * pw * c).permute(0, 2, 1, 3)
    return x.reshape(t * pt * h * ph * w * pw, c).transpose(0, 1).reshape(1, c, t * pt, h * ph, w * pw)


def token_chunk(tokens: int, config: WanConfig, dialect: Dialect) -> int:
    """Tokens that go through the feed-forward at once, so that the hidden activation stays small.

    Parts of equal size where a divisor is near: an engine's allocator gives the memory of one to the next only then.
    """
    if dialect.feed_forward_bytes is None:
        return tokens
    least = min(-(-tokens * config.ffn_dim * 4 // dialect.feed_forward_bytes), dialect.most_pieces)
    even = next((count for count in range(least, 2 * least) if tokens % count == 0), least)
    return -(-tokens // even)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, space: WeightSpace, config: WanConfig, index: int) -> None:
        """The block's weights."""
        super().__init__()
        name = f"blocks.{index}"
        self.config, self.dialect = config, space.dialect
        self.norm1, self.norm3 = (space.dialect.layer_norm(config.width, config.eps) for _ in range(2))
        self.norm2 = space.dialect.layer_norm(config.width, config.eps) if config.cross_attn_norm else None
        self.attn1 = Attention(space, f"{name}.attn1", config)
        self.attn2 = Attention(space, f"{name}.attn2", config)
        asks = f"{name}.attn2.to_q"
        self.norm2_weight = space.vector(f"{name}.norm2.weight", feeds=asks) if config.cross_attn_norm else None
        self.norm2_bias = space.vector(f"{name}.norm2.bias", feeds=asks) if config.cross_attn_norm else None
        self.ffn_in = linear(space, f"{name}.ffn.net.0.proj")
        self.ffn_out = linear(space, f"{name}.ffn.net.2")
        self.scale_shift_table = space.vector(f"{name}.scale_shift_table")
        self.divisor1 = space.migration(f"{name}.attn1.to_q")
        self.divisor3 = space.migration(f"{name}.ffn.net.0.proj")

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Tokens x [1, N, width] after the block, of the same shape."""
        table = self.scale_shift_table + modulation
        shift, scale, gate = table[:, 0:1], table[:, 1:2], table[:, 2:3]
        y = modulated(self.norm1(x), scale, shift, self.divisor1)
        x = x + self.attn1(y, y, cos, sin) * gate
        y = x if self.norm2 is None else self.norm2(x, self.norm2_weight, self.norm2_bias)
        x = x + self.attn2(y, context)
        tokens, step = x.shape[1], token_chunk(x.shape[1], self.config, self.dialect)
        if step == tokens:
            return self._feed_forward(x, table)
        parts = [self._feed_forward(x[:, start : start + step], table) for start in range(0, tokens, step)]
        return torch.cat(parts, dim=1)

    def _feed_forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = table[:, 3:4], table[:, 4:5], table[:, 5:6]
        y = modulated(self.norm3(x), scale, shift, self.divisor3)
        return x + self.ffn_out(self.dialect.gelu(self.ffn_in(y))) * gate


def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    """Normed tokens x [1, N, width], modulated by vectors [1, 1, width]; a divisor [width] acts on these alone."""
    gain = 1.0 + scale
    return x * gain + shift if divisor is None else x * (gain / divisor) + shift / divisor


class Attention(nn.Module):
    """Self- or cross-attention with query and key norms across heads."""

    def __init__(self, space: WeightSpace, name: str, config: WanConfig) -> None:
        """The weights of one attention."""
        super().__init__()
        dialect, heads = space.dialect, config.num_attention_heads
        self.heads, self.attention = heads, dialect.attention
        self.rms_q, self.rms_k = (dialect.rms_norm(config.width, config.eps) for _ in range(2))
        self.rotate = dialect.rotation(heads, config.attention_head_dim)
        self.to_q, self.to_k = linear(space, f"{name}.to_q"), linear(space, f"{name}.to_k")
        self.to_v, self.to_out = (
            linear(space, f"{name}.to_v", feeds=f"{name}.to_out.0"),
            linear(space, f"{name}.to_out.0"),
        )
        self.norm_q, self.norm_k = space.vector(f"{name}.norm_q.weight"), space.vector(f"{name}.norm_k.weight")

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from x [1, N, width] to the context [1, M, width]; rotated where tables are given."""
        q, k = self.rms_q(self.to_q(x), self.norm_q), self.keys(context)
        if cos is not None and sin is not None:
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        return self.to_out(self.attention(q, k, self.to_v(context), self.heads))

    def keys(self, context: torch.Tensor) -> torch.Tensor:
        """Keys of a context [1, M, width], not yet rotated."""
        return self.rms_k(self.to_k(context), self.norm_k)


class RotaryTables(nn.Module):
    """cos and sin [N, head size / 2], put together in the graph from one small table per axis.

    Each axis's table is zero where another axis turns, so that their sum is the table of all tokens, exactly.
    """

    def __init__(self, axes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take cos and sin [positions, head size / 2] along T, H and W, zero in channels that turn with another."""
        super().__init__()
        for axis, tables in enumerate(axes):
            for name, table in zip(("cos", "sin"), tables, strict=True):
                shape = [len(table) if axis == other else 1 for other in range(3)]
                self.register_buffer(f"{name}_{axis}", table.reshape(*shape, -1).float().clone(), persistent=False)

    def forward(self, grid: tuple[int, ...], zero: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of all tokens of a grid that is no longer on any axis; a `run_time_zero` makes them in the run."""
        return self._tokens("cos", grid, zero), self._tokens("sin", grid, zero)

    def _tokens(self, name: str, grid: tuple[int, ...], zero: torch.Tensor | None) -> torch.Tensor:
        t, h, w = (
            getattr(self, f"{name}_{axis}").narrow(axis, 0, length)
            if not isinstance(length, int)
            else getattr(self, f"{name}_{axis}")
            for axis, length in enumerate(grid)
        )
        return ((t if zero is None else t + zero) + (h + w)).reshape(math.prod(grid), -1)


def axis_tables(config: WanConfig, grid: tuple[int, int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """See `RotaryTables`: those of a token grid, as diffusers makes them."""
    theirs = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, max(grid))
    channel = torch.repeat_interleave(torch.arange(3), torch.tensor([theirs.t_dim, theirs.h_dim, theirs.w_dim]))

    def part(table: torch.Tensor, axis: int) -> torch.Tensor:
        return torch.where(channel == axis, table[: grid[axis]], 0.0)[:, ::2]  # theirs is repeated for pairs

    return [(part(theirs.freqs_cos, axis), part(theirs.freqs_sin, axis)) for axis in range(3)]


class Resize(nn.Module):
    """Trilinear resize as one matrix product per axis: exact, and without an operator that engines lack."""

    def __init__(self, size: tuple[int, ...], new_size: tuple[int, ...]) -> None:
        """Matrices that resize from one size [T, H, W] to another."""
        super().__init__()
        self.axes: list[int] = []
        for axis, (n, m) in enumerate(zip(size, new_size, strict=True)):
            if n != m:
                unit = torch.eye(n).unsqueeze(0)
                matrix = nn.functional.interpolate(unit, m, mode="linear", align_corners=False)[0]  # [n, m]
                self.register_buffer(f"matrix_{axis}", matrix.contiguous(), persistent=False)
                self.axes.append(axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, C, T, H, W], resized."""
        for axis in self.axes:
            x = x.transpose(axis + 2, 4)
            matrix = getattr(self, f"matrix_{axis}")
            flat = torch.mm(x.reshape(-1, x.shape[4]), matrix)
            x = flat.reshape(*x.shape[:4], -1).transpose(axis + 2, 4)
        return x
