"""The probability path of a stage: what its model is trained on, and what an exact model would return.

Sampling needs none of it: training, and tests of the chain against an exact model, do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyrexport.runtime.chain.levels import gain
from pyrexport.runtime.chain.pyramid import FrameGroup, Stage
from pyrexport.runtime.chain.wavelets import Array, Taps, analyse, synthesise

__all__ = ["advance", "band_pair", "downsample", "training_pair", "upsample"]


def downsample(x: Array, taps: Taps, axes: Sequence[int]) -> Array:
    """R↓(x) = U x / ω (eq. 1), the given axes halved; for Haar the average pooling."""
    return analyse(x, taps, axes)["0" * len(axes)] * (1 / gain(len(axes)))


def upsample(x: Array, taps: Taps, axes: Sequence[int]) -> Array:
    """R↑(x) = ω·Wᵀ(x; 0) (eq. 15), the given axes doubled; for Haar nearest neighbour. R↓R↑ = I."""
    return synthesise({"0" * len(axes): x}, taps, axes) * gain(len(axes))


def training_pair(group: FrameGroup, stage: Stage, x0: Any, low_pass: Any, noise: Any, level: Any) -> tuple[Any, Any]:
    """Input and target of one frame group of a stage at a natural level.

    `y_n = (1-σ_n)·R↑R↓(x0) + σ_n·ε`, `y_c = (1-σ_c)·x0 + σ_c·ε` with the same ε, `ρ = (σ-σ_c)/(σ_n-σ_c)`; input
    `(1-ρ)·y_c + ρ·y_n`, target `dy/dσ = (y_n-y_c)/(σ_n-σ_c)`, all levels global (supplement A3, eq. 17-19).
    For PPF and plain models, with `low_pass` the clean latent itself, this is plain flow matching.

    Args:
        group: whose gain relates natural and global levels.
        stage: whose boundaries apply.
        x0: clean latents of the group's frames, at the stage's scale; NumPy arrays or PyTorch tensors.
        low_pass: R↑(R↓(x0)), of the same shape. The coarsest stage's σ_n is 1, so any value will do there.
        noise: ε, of the same shape.
        level: natural level, a number or an array that broadcasts.
    """
    clean, noisy = group.global_level(stage.index, stage.clean), group.global_level(stage.index, stage.noisy)
    y_n = (1 - noisy) * low_pass + noisy * noise
    y_c = (1 - clean) * x0 + clean * noise
    rho = (group.global_level(stage.index, level) - clean) / (noisy - clean)
    return (1 - rho) * y_c + rho * y_n, (y_n - y_c) / (noisy - clean)


def band_pair(stages: Sequence[Stage], index: int, bands: Sequence[Any], noise: Sequence[Any], level: Any) -> Any:
    """Input and target of a PPF stage whose patches hold more numbers than its tokens are wide.

    Such a stage cannot return the noise of a whole patch, so that plain flow matching leaves noise where the next
    stage expects none. Here a stage removes noise from the bands it can hold alone, as a pyramidal stage does: band
    k is noise until stage k begins, falls linearly to that stage's clean level, and follows σ from then on. The path
    is linear in σ within every stage, and its target is dy/dσ.

    Args:
        stages: finest first.
        index: whose input and target to make.
        bands: of the clean latents, finest first, one for each stage, all of the latents' shape; their sum.
        noise: likewise of ε.
        level: σ, a number or an array that broadcasts.
    """
    stage, y, target = stages[index], 0, 0
    for k, (clean, random) in enumerate(zip(bands, noise, strict=True)):
        if k < index:
            slope, sigma = 0.0, 1.0
        elif k == index:
            slope = (1 - stage.clean) / (stage.noisy - stage.clean)
            sigma = stage.clean + slope * (level - stage.clean)
        else:
            slope, sigma = 1.0, level
        y = y + (1 - sigma) * clean + sigma * random
        target = target + slope * (random - clean)
    return y, target


def advance(stage: Stage, x: torch.Tensor, velocity: torch.Tensor, level: float, after: float) -> torch.Tensor:
    """Euler's step of latents [N, C, T, H, W] from a natural level to another: x + (σ' - σ)·v for each frame group."""
    steps = [group.global_level(stage.index, after) - group.global_level(stage.index, level) for group in stage.groups]
    groups = zip(stage.groups, steps, strict=True)
    return torch.cat([x[:, :, g.frames] + step * velocity[:, :, g.frames] for g, step in groups], 2)
