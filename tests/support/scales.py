"""Checkpoints in 8-bit floats with scales, as people repackage them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def scaled(tensors: Tensors, suffix: str, *, by_row: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    """Matrices in 8-bit floats, each with a scale beside it."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not name.endswith(".weight"):
            out[name] = tensor
            continue
        largest = tensor.flatten(1).abs().amax(1, keepdim=True) if by_row else tensor.abs().max()
        scale = (largest / 448).float()
        shape = (-1, *(1,) * (tensor.ndim - 1)) if by_row else ()
        out[name] = (tensor / scale.view(shape)).to(dtype)
        out[f"{name.removesuffix('.weight')}{suffix}"] = scale if by_row else scale.reshape(1)
    return out


def write_scaled(
    checkpoint: Path,
    out: Path,
    suffix: str = ".scale_weight",
    *,
    by_row: bool = False,
    change: Callable[[Tensors], None] = lambda tensors: None,
) -> Path:
    """A copy of a checkpoint whose transformer is in 8-bit floats, its tensors changed once more."""
    shutil.copytree(checkpoint, out)
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = scaled(load_file(file), suffix, by_row=by_row)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return out
