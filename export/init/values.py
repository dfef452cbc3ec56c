"""Random weights whose activations stay in a trained range, streamed into safetensors files."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.dtypes import DTYPES
from ...runtime.reporter import Reporter
from ..weights.steps import TORCH_DTYPES
from .documents import write_json

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
        groups = self._shards(tensors, DTYPES[dtype].nbytes)
        folder.mkdir(parents=True)
        self.reporter.begin(folder.name, sum(math.prod(shape) for shape in tensors.values()))
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            part = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
            file = f"{stem}{part}.safetensors"
            self._write_file(folder / file, group, dtype, blocks)
            weight_map |= dict.fromkeys(group, file)
        if len(groups) > 1:
            total = sum(math.prod(shape) for shape in tensors.values()) * DTYPES[dtype].nbytes
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / f"{stem}.safetensors.index.json", index)

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

    def _write_file(self, file: Path, tensors: Shapes, dtype: str, blocks: int) -> None:
        itemsize, end = DTYPES[dtype].nbytes, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, shape in tensors.items():
            begin, end = end, end + math.prod(shape) * itemsize
            code = DTYPES[dtype].safetensors
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in tensors.items():
                for piece in pieces(name, shape, blocks, self.seed, TORCH_DTYPES[dtype]):
                    out.write(piece)
                    self.reporter.advance(len(piece) // itemsize)
