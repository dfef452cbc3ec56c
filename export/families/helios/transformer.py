"""Helios' transformer of one stage as a graph: Wan's blocks over the tokens of the history and of the current chunk.

Equal to diffusers' `HeliosTransformer3DModel` up to the order of float32 sums.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ....runtime.chain.pyramid import Stage
from ....runtime.model.families.helios import LONG, MID, RECENT, SHORT, HeliosConfig, Pooled
from ..layers import WeightSpace, linear, run_time_zero
from ..wan.transformer import Attention, Block, RotaryTables, modulated, patchify, token_chunk, unpatchify

__all__ = ["HeliosGraph"]

PARTS = (LONG, MID, SHORT)
"""The history's parts in the order of their tokens, which come before the current ones."""

MOST_SCALE = 10.0
"""What the scale of the history's keys stays below."""


class HeliosGraph(nn.Module):
    """The graph of a stage.

    Inputs: latent [1, C, T, H, W], timestep features [1, freq_dim], text [1, L, text_dim], history [1, C, 20, h, w] in
    the size of the finest stage; output: velocity, shaped as the latent.

    The history's shape is fixed; the latent's may be symbolic: the graph of the finest stage is that of all.
    """

    def __init__(self, space: WeightSpace, config: HeliosConfig, stage: Stage) -> None:
        """The graph of one stage, its weights from a transformer's space."""
        super().__init__()
        dialect = space.dialect
        self.config, self.stage, self.gelu, self.folds = config, stage, dialect.gelu, dialect.folds
        self.patch_embedding = linear(space, "patch_embedding", precise=True)
        self.history_embeddings = nn.ModuleList(linear(space, part.layer, precise=True) for part in PARTS)
        self.grids = [part.grid(stage.whole, config.patch_size) for part in PARTS]
        self.past = sum(t * h * w for t, h, w in self.grids)
        time = "condition_embedder.time_embedder"
        self.time_1, self.time_2 = (linear(space, f"{time}.linear_{n}", precise=True) for n in (1, 2))
        self.time_proj = linear(space, "condition_embedder.time_proj", precise=True)
        text = "condition_embedder.text_embedder"
        self.text_1, self.text_2 = linear(space, f"{text}.linear_1"), linear(space, f"{text}.linear_2")
        self.blocks = nn.ModuleList(HeliosBlock(space, config, index, self.past) for index in range(config.num_layers))
        self.norm_out = dialect.layer_norm(config.width, config.eps)
        self.scale_shift_table = space.vector("norm_out.scale_shift_table")
        self.proj_out = linear(space, "proj_out", precise=True)
        cos = torch.arange(config.freq_dim) < config.freq_dim // 2
        self.zero: torch.Tensor
        self.register_buffer("zero", cos.float()[None], persistent=False)  # the features of timestep 0
        # Frames of the history and of the chunk are numbered in one go.
        _, height, width = self.grids[-1]
        finest = (height, width)
        self.ropes = nn.ModuleList(RotaryTables(_tables(config, part.frames, finest, part.times)) for part in PARTS)
        frames = range(RECENT.frames, RECENT.frames + stage.grid[0])
        self.rope = RotaryTables(_tables(config, frames, stage.grid[1:], 1))

    def forward(
        self, latent: torch.Tensor, timestep_features: torch.Tensor, text: torch.Tensor, history: torch.Tensor
    ) -> torch.Tensor:
        """The velocity."""
        patch = self.config.patch_size
        grid = tuple(n // p for n, p in zip(latent.shape[2:], patch, strict=True))
        zero = run_time_zero(timestep_features[:, :1]) if self.folds else None
        tables = [rope(own, zero) for rope, own in zip(self.ropes, self.grids, strict=True)] + [self.rope(grid, zero)]
        cos, sin = (torch.cat(own) for own in zip(*tables, strict=True))
        x = torch.cat([*self._embed_history(history), self.patch_embedding(patchify(latent, grid, patch))], dim=1)
        features = torch.cat((self.zero, timestep_features))  # the history is at timestep 0
        embedded = self.time_2(nn.functional.silu(self.time_1(features)))
        modulation = self.time_proj(nn.functional.silu(embedded)).unflatten(1, (6, -1))
        context = self.text_2(self.gelu(self.text_1(text)))
        for block in self.blocks:
            x = block(x, context, modulation, cos, sin)
        table = self.scale_shift_table + embedded[1:].reshape(1, 1, -1)
        x = self.norm_out(x[:, self.past :]) * (1.0 + table[:, 1:2]) + table[:, 0:1]
        return unpatchify(self.proj_out(x), grid, patch, self.config.out_channels)

    def _embed_history(self, history: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of each part of the history."""
        found = []
        for part, grid, embedding in zip(PARTS, self.grids, self.history_embeddings, strict=True):
            t, h, w = (part.times * p for p in self.config.patch_size)
            found.append(embedding(patchify(_frames(history, part), grid, (t, h, w))))
        return found


def _frames(history: torch.Tensor, part: Pooled) -> torch.Tensor:
    """The latent frames of a part of a history [1, C, T, H, W]."""
    first, last = part.frames[0], part.frames[-1]
    if last - first + 1 == len(part.frames):
        return history[:, :, first : last + 1]
    return torch.cat([history[:, :, frame : frame + 1] for frame in part.frames], dim=2)


def _tables(
    config: HeliosConfig, frames: Sequence[int], size: Sequence[int], times: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """See `RotaryTables`: of tokens that each stand for `times` positions along each axis, the mean of theirs."""
    found, start = [], 0
    for dim, positions in zip(config.rope_dim, (frames, *map(range, size)), strict=True):
        frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        angles = torch.outer(torch.tensor(list(positions), dtype=torch.float32), frequencies)
        others = (start, config.attention_head_dim // 2 - start - dim // 2)
        cos, sin = (
            nn.functional.pad(table.unflatten(0, (-1, times)).mean(1), others) for table in (angles.cos(), angles.sin())
        )
        found.append((cos, sin))
        start += dim // 2
    return found


class HeliosBlock(Block):
    """One transformer block. The history is not told of the text, and is at a timestep of its own."""

    def __init__(self, space: WeightSpace, config: HeliosConfig, index: int, past: int) -> None:
        """The block's weights; `past` is the number of the history's tokens."""
        super().__init__(space, config, index)
        self.past = past
        if config.is_amplify_history:
            self.attn1 = AmplifiedAttention(space, f"blocks.{index}.attn1", config, past)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Tokens x [1, N, width] after the block; the rows of the modulation [2, 6, width]: history, current."""
        table = self.scale_shift_table + modulation
        old, new = table[:1], table[1:]
        y = self.norm1(x)
        parts = ((y[:, : self.past], old), (y[:, self.past :], new))
        y = torch.cat([modulated(part, row[:, 1:2], row[:, 0:1], self.divisor1) for part, row in parts], dim=1)
        y = self.attn1(y, y, cos, sin)
        past = x[:, : self.past] + y[:, : self.past] * old[:, 2:3]
        x = x[:, self.past :] + y[:, self.past :] * new[:, 2:3]
        y = x if self.norm2 is None else self.norm2(x, self.norm2_weight, self.norm2_bias)
        x = x + self.attn2(y, context)
        return torch.cat([*self._fed_forward(past, old), *self._fed_forward(x, new)], dim=1)

    def _fed_forward(self, x: torch.Tensor, table: torch.Tensor) -> list[torch.Tensor]:
        """Tokens after the feed-forward, in the pieces that they go through it in."""
        tokens, step = x.shape[1], token_chunk(x.shape[1], self.config, self.dialect)
        starts = [0] if step == tokens else range(0, tokens, step)
        found = []
        for start in starts:
            piece = x if step == tokens else x[:, start : start + step]
            y = modulated(self.norm3(piece), table[:, 4:5], table[:, 3:4], self.divisor3)
            found.append(piece + self.ffn_out(self.dialect.gelu(self.ffn_in(y))) * table[:, 5:6])
        return found


class AmplifiedAttention(Attention):
    """Self-attention with a scale of the history's keys."""

    def __init__(self, space: WeightSpace, name: str, config: HeliosConfig, past: int) -> None:
        """The weights of one attention; the keys of the first `past` tokens are scaled."""
        super().__init__(space, name, config)
        self.past, self.size = past, config.attention_head_dim
        self.history_key_scale = space.vector(f"{name}.history_key_scale")

    def keys(self, context: torch.Tensor) -> torch.Tensor:
        """Keys of a context [1, M, width], not yet rotated."""
        keys = super().keys(context)
        scale = 1.0 + torch.sigmoid(self.history_key_scale) * (MOST_SCALE - 1.0)
        per_channel = scale.reshape(1, -1, 1).expand(1, scale.shape[0], self.size).reshape(1, 1, -1)
        if scale.shape[0] == 1:
            per_channel = scale.reshape(1, 1, 1)
        return torch.cat((keys[:, : self.past] * per_channel, keys[:, self.past :]), dim=1)
