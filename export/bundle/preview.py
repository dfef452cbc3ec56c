"""The map of a preview, fitted to a checkpoint's own VAE: colours that went in, against the latents that came out."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...runtime.chain.noise import generator
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.preview import LEAST_R2, PreviewMap
from ...runtime.reporter import Reporter
from ..families import modules_of

__all__ = ["find_preview", "fit_map"]

FRAMES, CELLS = 24, 8
"""Synthetic frames, and latent pixels along an axis of each: 64x64 pixels of Wan."""

Encode = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A frame [3, H, W] in -1 … 1 to its latent [C, h, w], as the transformer sees it."""


def find_preview(checkpoint: Checkpoint, reporter: Reporter) -> PreviewMap | None:
    """The map that the checkpoint gives, or one fitted to its VAE; None where it would show nothing."""
    if checkpoint.model.preview is not None:
        return checkpoint.model.preview
    if not checkpoint.vae:
        return None
    reporter.begin("preview", FRAMES)
    encode = modules_of(checkpoint.model.family).load_encoder(checkpoint)
    try:
        found = fit_map(encode, checkpoint.model.pyramid.geometry.spatial, lambda: reporter.advance(1))
    except RuntimeError as error:  # PyTorch's: a decoder alone makes a bundle, whatever its encoder
        reporter.warned(f"no previews: the VAE's encoder does not run ({' '.join(str(error).split())[:120]})")
        return None
    if found.r2 < LEAST_R2:
        reporter.warned(
            f"no previews: a linear map explains {max(found.r2, 0):.2f} of this VAE's colours, not {LEAST_R2}"
        )
        return None
    return found


def fit_map(encode: Encode, spatial: int, advance: Callable[[], None] = lambda: None) -> PreviewMap:
    """Least squares over frames of coloured blocks, encoded one at a time; judged on every fourth, left out of it."""
    noise, latents, colours = generator(0), list[NDArray[np.float32]](), list[NDArray[np.float32]]()
    for _ in range(FRAMES):
        cells = _blocks(noise)
        latents.append(encode(np.repeat(np.repeat(cells * 2 - 1, spatial, 1), spatial, 2)))
        colours.append(cells)
        advance()
    held = np.arange(FRAMES) % 4 == 3
    rows = np.linalg.lstsq(_columns(latents, ~held), _flat(colours, ~held), rcond=None)[0]
    wanted = _flat(colours, held)
    error = ((_columns(latents, held) @ rows - wanted) ** 2).sum()
    r2 = 1 - float(error / ((wanted - wanted.mean(0)) ** 2).sum())
    return PreviewMap(tuple((float(r), float(g), float(b)) for r, g, b in rows), round(r2, 4))


def _blocks(noise: np.random.Generator) -> NDArray[np.float32]:
    """Colours [3, cells, cells] in 0 … 1: blocks of a size of their own, over a slope."""
    size = int(noise.integers(2, CELLS // 2 + 1))
    coarse = noise.random((3, -(-CELLS // size), -(-CELLS // size)), dtype=np.float32)
    blocks = np.repeat(np.repeat(coarse, size, 1), size, 2)[:, :CELLS, :CELLS]
    slope = np.linspace(0, 1, CELLS, dtype=np.float32) * noise.random((3, 1, 1), dtype=np.float32)
    return np.asarray(0.8 * blocks + 0.2 * slope, np.float32)


def _flat(values: list[NDArray[np.float32]], picked: NDArray[np.bool_]) -> NDArray[np.float64]:
    chosen = [value for value, taken in zip(values, picked, strict=True) if taken]
    return np.concatenate([value.reshape(len(value), -1).T for value in chosen]).astype(np.float64)


def _columns(latents: list[NDArray[np.float32]], picked: NDArray[np.bool_]) -> NDArray[np.float64]:
    flat = _flat(latents, picked)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
