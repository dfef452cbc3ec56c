"""The modules of the stages that are trained, what they begin with, and the bands of PPF's latents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from pyrexport.export.families.wan.modules import StageTransformer
from pyrexport.runtime.model.description import Model
from safetensors.torch import load_file
from torch import nn

__all__ = ["bands_of", "make_stages", "start_from"]


def bands_of(x: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """The bands [N, C, T, H, W] of latents, finest first: what averages over 2^k x 2^k hold and coarser ones do not."""
    averages = [x]
    for k in range(1, depth):
        pooled = nn.functional.avg_pool3d(x, (1, 2**k, 2**k))
        averages.append(nn.functional.interpolate(pooled, scale_factor=(1.0, 2.0**k, 2.0**k), mode="nearest"))
    return [fine - coarse for fine, coarse in pairwise(averages)] + [averages[-1]]


def start_from(parts: Path, named: Mapping[str, nn.Parameter], patch_sizes: Sequence[tuple[int, ...]]) -> None:
    """Give parameters the weights of another checkpoint's transformer.

    Patch layers are spread over larger patches; of wider feed-forward layers, the units that weigh most are kept.
    """
    weights = load_file(parts / "transformer" / "diffusion_pytorch_model.safetensors")
    _narrow(weights, named)
    for name, p in named.items():
        part, _, rest = name.partition(".")
        index, _, leaf = rest.partition(".")
        if name in weights:
            p.data.copy_(weights[name].view_as(p))
            continue
        w, (t, h, _) = weights[f"{part}.{leaf}"].float(), patch_sizes[int(index)]
        if part == "patch_embedding" and leaf == "weight":
            # Scaled so that noise keeps its variance through the average over each finer patch.
            w = w.repeat(1, 1, t, 1, 1).repeat_interleave(h // 2, 3).repeat_interleave(h // 2, 4) / (t * h / 2)
        elif part == "proj_out":
            w = w.unflatten(0, (1, 2, 2, -1)).repeat(t, *[1] * (w.ndim + 2))
            w = w.repeat_interleave(h // 2, 1).repeat_interleave(h // 2, 2).flatten(0, 3)
        p.data.copy_(w)


def _narrow(weights: dict[str, torch.Tensor], named: Mapping[str, nn.Parameter]) -> None:
    """Cut feed-forward layers to the widths of the parameters."""
    for into in [name for name in weights if name.endswith("ffn.net.0.proj.weight")]:
        bias, out = into.removesuffix("weight") + "bias", into.replace("net.0.proj", "net.2")
        weight = weights[into].float().norm(dim=1) * weights[out].float().norm(dim=0)
        kept = weight.topk(len(named[into])).indices.sort().values
        weights |= {into: weights[into][kept], bias: weights[bias][kept], out: weights[out][:, kept]}


def make_stages(model: Model) -> tuple[list[StageTransformer], dict[str, nn.Parameter]]:
    """A module per stage, and all parameters by their names in the checkpoint."""
    pyramid = model.pyramid
    config = asdict(model.transformer)
    whole = WanTransformer3DModel(**config | {"patch_size": pyramid.patch_sizes[0]})
    if not pyramid.kind.own_patch_layers:
        stage = StageTransformer(whole, torch.zeros(model.transformer.width)).requires_grad_(True)
        return [stage] * pyramid.depth, dict(whole.named_parameters()) | {
            "first_frame_embedding": stage.first_frame_embedding
        }
    stages, parameters = [], {}
    for i, patch in enumerate(pyramid.patch_sizes):
        module = whole if i == 0 else WanTransformer3DModel(**config | {"num_layers": 1, "patch_size": patch})
        module.blocks, module.condition_embedder = whole.blocks, whole.condition_embedder
        module.scale_shift_table = whole.scale_shift_table
        stages.append(StageTransformer(module))
        for name, p in module.named_parameters():
            part, _, leaf = name.partition(".")
            parameters[f"{part}.{i}.{leaf}" if part in ("patch_embedding", "proj_out") else name] = p
    return stages, parameters
