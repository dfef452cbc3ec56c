"""Random weights whose activations stay in a trained range, streamed into safetensors files."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...runtime.dtypes import DTYPES
from ...runtime.reporter import Reporter
from ..weights.steps import TORCH_DTYPES
from .tensors import Streamed, write_index, write_tensors

__all__ = ["RandomWriter"]

PIECE = 16 * 1024 * 1024
"""Values that are made at once: 64 MiB of float32."""

Shapes = Mapping[str, tuple[int, ...]]


def scale_of(name: str, shape: tuple[int, ...], blocks: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: unit gain through a layer, small steps on the residual stream."""
    leaf = name.rsplit(".", 1)[-1]
    if name.endswith("gamma") or ("norm" in name and leaf == "weight"):
        return 1.0, 0.02
    if leaf == "bias":
        return 0.0, 0.02
    if "scale_shift_table" in name or name == "first_frame_embedding":
        return 0.0, 1 / math.sqrt(shape[-1])
    if name.endswith(("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")):
        return 0.0, 1.0
    if name.endswith("SelfAttention.q.weight"):  # T5 does not divide the scores by sqrt(d_kv)
        return 0.0, 1 / math.sqrt(shape[1] * 8)
    into = math.prod(shape[1:])
    residual = name.endswith(("to_out.0.weight", "ffn.net.2.weight", ".o.weight", ".wo.weight"))
    return 0.0, (1 / math.sqrt(2 * blocks) if residual else 1.0) / math.sqrt(into)


def pieces(name: str, shape: tuple[int, ...], blocks: int, seed: int, dtype: torch.dtype) -> Iterator[bytes]:
    """Bytes of a tensor; its values depend on its name and the seed alone."""
    mean, std = scale_of(name, shape, blocks)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    noise = np.random.Generator(np.random.SFC64(key))
    left = math.prod(shape)
    while left:
        count = min(left, PIECE)
        values = noise.standard_normal(count, dtype=np.float32)
        values *= std
        values += mean
        yield torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().tobytes()
        left -= count


@dataclass(frozen=True)
class RandomWriter:
    """Writes the tensors of components, one at a time."""

    seed: int
    shard: int
    """Bytes above which tensors go to another file."""
    reporter: Reporter

    def write(self, folder: Path, stem: str, tensors: Shapes, *, dtype: str, blocks: int) -> None:
        """Write one safetensors file, or shards with an index.

        Args:
            folder: the folder, which is made.
            stem: what the files' names begin with.
            tensors: shapes, by name.
            dtype: a name of `TORCH_DTYPES`.
            blocks: how many add up on the residual stream.
        """
        itemsize = DTYPES[dtype].nbytes
        groups = self._shards(tensors, itemsize)
        folder.mkdir(parents=True)
        total = sum(math.prod(shape) for shape in tensors.values()) * itemsize
        self.reporter.begin(folder.name, total)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            part = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
            file = f"{stem}{part}.safetensors"
            streamed = {name: self._streamed(name, shape, dtype, blocks) for name, shape in group.items()}
            write_tensors(folder / file, streamed, self.reporter.advance)
            weight_map |= dict.fromkeys(group, file)
        if len(groups) > 1:
            write_index(folder, stem, weight_map, total)

    def _streamed(self, name: str, shape: tuple[int, ...], dtype: str, blocks: int) -> Streamed:
        return Streamed(dtype, shape, lambda: pieces(name, shape, blocks, self.seed, TORCH_DTYPES[dtype]))

    def _shards(self, tensors: Shapes, itemsize: int) -> list[dict[str, tuple[int, ...]]]:
        groups: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, shape in tensors.items():
            nbytes = math.prod(shape) * itemsize
            if groups[-1] and filled + nbytes > self.shard:
                groups.append({})
                filled = 0
            groups[-1][name] = shape
            filled += nbytes
        return groups
