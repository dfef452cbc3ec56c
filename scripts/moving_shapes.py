"""The moving-shapes data: prompts, and clips that show what they say."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 200, 40),
    "blue": (50, 70, 235),
    "yellow": (230, 215, 40),
    "magenta": (220, 45, 215),
    "cyan": (40, 210, 220),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PHRASINGS = (
    "a {colour} {shape} moving {direction}",
    "{colour} {shape} moves {direction}",
    "the {colour} {shape} is moving {direction}",
    "a {shape} in {colour}, moving {direction}",
)
BACKGROUND = (18, 18, 24)
FRAMES, SIZE = 17, 128


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for."""

    shape: str
    colour: str
    direction: str

    def prompt(self, phrasing: int = 0) -> str:
        """The scene in words."""
        return PHRASINGS[phrasing].format(**vars(self))


SCENES = tuple(Scene(*words) for words in product(SHAPES, COLOURS, DIRECTIONS))
"""All 72."""


def prompts() -> list[str]:
    """One prompt per scene, the phrasings in turn."""
    return [scene.prompt(i % len(PHRASINGS)) for i, scene in enumerate(SCENES)]


def draw(random: np.random.Generator, scenes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Random size, place and speed for scenes [N]: columns radius, x, y of the first frame, dx, dy per frame."""
    n = len(scenes)
    radius = random.uniform(12, 22, n)
    travel = random.uniform(32, 72, n)
    step = np.array([DIRECTIONS[SCENES[i].direction] for i in scenes]) * (travel / (FRAMES - 1))[:, None]
    total = step * (FRAMES - 1)
    low = radius[:, None] + 2 + np.maximum(0, -total)
    high = SIZE - radius[:, None] - 2 - np.maximum(0, total)
    place = low + (high - low) * random.uniform(0, 1, (n, 2))
    return np.concatenate([radius[:, None], place, step], axis=1).astype(np.float32)


def crop(geometry: NDArray[np.float32], random: np.random.Generator, size: int) -> NDArray[np.float32]:
    """The geometry seen through a window of `size` pixels whose middle the shape crosses at its own speed."""
    shifted = geometry.copy()
    middle = shifted[:, 1:3] + shifted[:, 3:5] * (FRAMES - 1) / 2
    shifted[:, 1:3] += size * random.uniform(0.3, 0.7, middle.shape) - middle
    return shifted


def distance(shape: str, x: Any, y: Any, radius: Any) -> Any:
    """How far points lie outside a shape around the origin, in pixels; NumPy arrays or PyTorch tensors."""
    if shape == "circle":
        return (x * x + y * y) ** 0.5 - radius
    if shape == "square":
        return _larger(abs(x), abs(y)) - radius
    return _larger((abs(x) - (y + radius) / 2) * (2 / math.sqrt(5)), y - radius)


def _larger(a: Any, b: Any) -> Any:
    return (a + b + abs(a - b)) / 2


def render(scenes: NDArray[np.int64], geometry: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Clips [N, 3, T, H, W] in -1 … 1, edges anti-aliased, for scenes [N] and their geometry [N, 5]."""
    device = geometry.device
    axis = torch.arange(size, device=device) + 0.5
    time = torch.arange(FRAMES, device=device)
    radius = geometry[:, 0].view(-1, 1, 1, 1)
    x = axis.view(1, 1, 1, -1) - (geometry[:, 1:2] + geometry[:, 3:4] * time).view(-1, FRAMES, 1, 1)
    y = axis.view(1, 1, -1, 1) - (geometry[:, 2:3] + geometry[:, 4:5] * time).view(-1, FRAMES, 1, 1)
    kinds = torch.tensor([SHAPES.index(SCENES[i].shape) for i in scenes], device=device)
    outside = torch.zeros(len(scenes), FRAMES, size, size, device=device)
    for k, name in enumerate(SHAPES):
        outside = torch.where((kinds == k).view(-1, 1, 1, 1), distance(name, x, y, radius), outside)
    cover = (0.5 - outside).clamp(0, 1)[:, None]
    paint = torch.tensor([COLOURS[SCENES[i].colour] for i in scenes], device=device).view(-1, 3, 1, 1, 1)
    ground = torch.tensor(BACKGROUND, device=device).view(1, 3, 1, 1, 1)
    return (ground + cover * (paint - ground)) / 127.5 - 1
