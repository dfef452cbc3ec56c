"""Latents to frames: one latent frame after the other, whole or in tiles, with the caches of the frame before."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.engines import Held
from ..bundle.graphs import FRAMES, LATENT, Decoder, GraphKey, cache_names, decoder_key
from ..bundle.manifest import Manifest
from ..bundle.tiles import decode_tiled
from ..errors import CheckFailed, UsageError
from .graphs import OpenGraphs

__all__ = ["decode", "decode_tile", "frames_from", "require_finite"]

Array = NDArray[np.float32]


def frames_from(video: Array) -> NDArray[np.uint8]:
    """Frames [n, 3, H, W] in -1 … 1 to [n, H, W, 3], rounded as diffusers' VideoProcessor does."""
    scaled = np.clip(video * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.asarray((scaled * np.float32(255)).round(), np.uint8).transpose(0, 2, 3, 1)


def require_finite(values: Array, what: str) -> None:
    """Refuse NaN and infinity, which would otherwise become black frames.

    Raises:
        CheckFailed: there are some.
    """
    if not np.isfinite(values).all():
        raise CheckFailed(f"{what} are not finite: the weights or the embeddings are damaged; run parity")


def decode(graphs: OpenGraphs, latent: Array, decoder: Decoder | None) -> Iterator[Array]:
    """Frames [n, 3, H, W] in -1 … 1 of a latent [C, T, H, W], by one of the bundle's decoders: one, then four by four.

    A frame that is decoded in tiles comes when its last tile does.

    Raises:
        UsageError: the bundle has no decoder.
    """
    if decoder is None:
        raise UsageError(f"{graphs.bundle.folder} has no VAE: take latents")
    if decoder.tiles.count == 1:
        return decode_tile(graphs, latent, decoder)
    return decode_tiled(decoder.tiles, latent, lambda tile: decode_tile(graphs, tile, decoder))


def decode_tile(graphs: OpenGraphs, latent: Array, decoder: Decoder) -> Iterator[Array]:
    """A latent [C, T, h, w] of a tile's size to frames [n, 3, 8h, 8w] in -1 … 1, one latent frame at a time."""
    manifest, component = graphs.bundle.manifest, decoder.component
    geometry = manifest.model.pyramid.geometry
    size = [geometry.spatial * n for n in latent.shape[2:]]
    run = _run_packed if decoder.packed else _run
    caches: dict[str, Any] = {}
    for index in range(latent.shape[1]):
        key, frame = decoder_key(component, first=index == 0), _taken(manifest, component, latent[:, index])[None]
        shape = [geometry.temporal if index else 1, 3, *size]
        frames, caches = run(graphs, key, {LATENT: frame} | caches, shape)
        require_finite(frames, "the decoded frames")
        yield frames


def _taken(manifest: Manifest, component: str, frame: Array) -> Array:
    """A latent frame [C, h, w] as a decoder takes it."""
    if manifest.model.decoders[component].normalised:
        return frame
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in (manifest.latents_mean, manifest.latents_std)
    )
    return np.asarray(frame * std + mean)


def _run(
    graphs: OpenGraphs, key: GraphKey, inputs: dict[str, Any], shape: list[int]
) -> tuple[Array, dict[str, NDArray[Any]]]:
    """Frames, and the caches as the next frame takes them."""
    outputs = graphs.run(key, inputs)
    count = len(outputs) - 1
    renamed = zip(cache_names(count), cache_names(count, new=True), strict=True)
    return outputs[FRAMES], {old: outputs[new] for old, new in renamed}


def _run_packed(
    graphs: OpenGraphs, key: GraphKey, inputs: dict[str, Any], shape: list[int]
) -> tuple[Array, dict[str, NDArray[Any] | Held]]:
    """Frames of a shape; the caches, which only the engine reads again, may stay where they are."""
    packed, count, (cache,) = graphs.run_packed(key, inputs), math.prod(shape), cache_names(1)
    return np.asarray(packed[:count]).reshape(shape), {cache: packed[count:]}
