"""What a clip of moving shapes shows, told without any learned part.

Colour is the hue of the shape, direction the way of its centroid, shape the ideal outline that overlaps it best.
"""

import colorsys
from itertools import product

import numpy as np
from moving_shapes import COLOURS, DIRECTIONS, SHAPES, Scene, distance
from numpy.typing import NDArray

__all__ = ["ATTRIBUTES", "judge", "masks_of", "overlap", "scores"]

ATTRIBUTES = ("colour", "direction", "shape")
LEAST_TRAVEL = 12.0
"""Pixels that a centroid must move over a clip; real clips move 32 to 72."""
LEAST_OVERLAP = 0.8
"""With the best ideal shape, for it to be one; a disc and a square can overlap by 0.9."""
MARGIN = 3
"""Pixels around a mask in which the edge of an ideal shape is looked for."""
Masks = NDArray[np.bool_]


def masks_of(clip: NDArray[np.uint8]) -> Masks | None:
    """Where the shape is in a clip [T, H, W, 3]: [T, H, W]; None if there is none in some frame."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    ground = np.median(border.reshape(-1, 3), axis=0)
    difference = np.abs(clip.astype(np.float64) - ground).max(axis=-1)
    strength = np.quantile(difference.reshape(len(clip), -1), 0.99, axis=1)
    masks = difference > np.maximum(strength / 2, 20)[:, None, None]
    return None if masks.sum(axis=(1, 2)).min() < 50 else masks


def judge(clip: NDArray[np.uint8]) -> tuple[Scene, dict[str, float]]:
    """What a clip [T, H, W, 3] shows, "none" for an attribute that cannot be told; and its overlap with each shape."""
    masks = masks_of(clip)
    if masks is None:
        return Scene("none", "none", "none"), dict.fromkeys(SHAPES, 0.0)
    overlaps = {shape: overlap(masks, shape) for shape in SHAPES}
    best = max(SHAPES, key=lambda shape: overlaps[shape])
    scene = Scene(best if overlaps[best] > LEAST_OVERLAP else "none", _colour(clip[masks]), _direction(masks))
    return scene, overlaps


def overlap(masks: Masks, shape: str) -> float:
    """Intersection over union of masks [T, H, W] with the shape that fits each best; the mean over frames."""
    return float(np.mean([_best_overlap(mask, shape) for mask in masks]))


def _best_overlap(mask: Masks, shape: str) -> float:
    """The best of all places and sizes, from the place and the size that the moments of the mask say."""
    rows, columns = np.nonzero(mask)
    area = len(rows)
    top, left = np.maximum(0, (rows.min() - MARGIN, columns.min() - MARGIN))
    part = mask[top : rows.max() + MARGIN + 1, left : columns.max() + MARGIN + 1]
    y, x = (axis + 0.5 for axis in np.indices(part.shape))
    radius = {"circle": (area / np.pi) ** 0.5, "square": area**0.5 / 2, "triangle": (area / 2) ** 0.5}[shape]
    # A triangle's centroid lies below the middle of its height, by a sixth of it.
    lower = radius / 3 if shape == "triangle" else 0.0
    found = np.array([columns.mean() + 0.5 - left, rows.mean() + 0.5 - top - lower, radius])
    best = 0.0
    for step in (2.0, 1.0, 0.5, 0.25):
        while True:
            tried = found + step * np.array(list(product((0, -1, 1), repeat=3)))
            cx, cy, radii = (values[:, None, None] for values in tried.T)
            ideal = distance(shape, x - cx, y - cy, radii) < 0
            common = (ideal & part).sum(axis=(1, 2))
            overlaps = common / (ideal.sum(axis=(1, 2)) + area - common)
            if overlaps.max() <= best:
                break
            best, found = float(overlaps.max()), tried[overlaps.argmax()]
    return best


def _colour(pixels: NDArray[np.uint8]) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(np.median(pixels, axis=0) / 255))
    if saturation < 0.35:
        return "none"
    hues = {name: colorsys.rgb_to_hsv(*(np.array(rgb) / 255))[0] for name, rgb in COLOURS.items()}
    return min(hues, key=lambda name: abs((hues[name] - hue + 0.5) % 1 - 0.5))


def _direction(masks: Masks) -> str:
    rows, columns = np.indices(masks.shape[1:])
    area = masks.sum(axis=(1, 2))
    x, y = (masks * columns).sum(axis=(1, 2)) / area, (masks * rows).sum(axis=(1, 2)) / area
    way = np.array([x[-3:].mean() - x[:3].mean(), y[-3:].mean() - y[:3].mean()])
    if np.abs(way).max() < LEAST_TRAVEL or np.abs(way).min() > 0.5 * np.abs(way).max():
        return "none"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], way)))


def scores(clips: list[NDArray[np.uint8]], scenes: list[Scene]) -> dict[str, float]:
    """Share of clips in which each attribute is right, and all of them; mean overlap with the shape that was asked."""
    found = [judge(clip) for clip in clips]
    right = {
        a: np.array([getattr(f, a) == getattr(s, a) for (f, _), s in zip(found, scenes, strict=True)])
        for a in ATTRIBUTES
    }
    every = np.all(list(right.values()), axis=0)
    shares = {a: float(values.mean()) for a, values in right.items()} | {"all": float(every.mean())}
    overlaps = [of[scene.shape] for (_, of), scene in zip(found, scenes, strict=True)]
    return shares | {"overlap": float(np.mean(overlaps))}
