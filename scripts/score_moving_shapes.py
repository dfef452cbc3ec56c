"""Judge clips of moving shapes without any learned part, and score a model over the 72 prompts.

    python scripts/score_moving_shapes.py MODEL [--schedule NAME] [--seeds 0,1] [--save FOLDER]

Colour is the hue of the shape, direction the way of its centroid, shape its area against its bounding box.
"""

import colorsys
import json
from pathlib import Path

import click
import numpy as np
from moving_shapes import COLOURS, DIRECTIONS, SCENES, Scene, prompts
from numpy.typing import NDArray
from rich.progress import track

ATTRIBUTES = ("colour", "direction", "shape")
LEAST_TRAVEL = 12.0
"""Pixels that a centroid must move over a clip; real clips move 32 to 72."""


def judge(clip: NDArray[np.uint8]) -> Scene:
    """What a clip [T, H, W, 3] shows; "none" for an attribute that cannot be told."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    ground = np.median(border.reshape(-1, 3), axis=0)
    difference = np.abs(clip.astype(np.float64) - ground).max(axis=-1)
    strength = np.quantile(difference.reshape(len(clip), -1), 0.99, axis=1)
    masks = difference > np.maximum(strength / 2, 20)[:, None, None]
    if masks.sum(axis=(1, 2)).min() < 50:
        return Scene("none", "none", "none")
    return Scene(_shape(masks), _colour(clip[masks]), _direction(masks))


def _colour(pixels: NDArray[np.uint8]) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(np.median(pixels, axis=0) / 255))
    if saturation < 0.35:
        return "none"
    hues = {name: colorsys.rgb_to_hsv(*(np.array(rgb) / 255))[0] for name, rgb in COLOURS.items()}
    return min(hues, key=lambda name: abs((hues[name] - hue + 0.5) % 1 - 0.5))


def _direction(masks: NDArray[np.bool_]) -> str:
    rows, columns = np.indices(masks.shape[1:])
    area = masks.sum(axis=(1, 2))
    x, y = (masks * columns).sum(axis=(1, 2)) / area, (masks * rows).sum(axis=(1, 2)) / area
    way = np.array([x[-3:].mean() - x[:3].mean(), y[-3:].mean() - y[:3].mean()])
    if np.abs(way).max() < LEAST_TRAVEL or np.abs(way).min() > 0.5 * np.abs(way).max():
        return "none"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], way)))


def _shape(masks: NDArray[np.bool_]) -> str:
    """By the share of its box that a shape fills: a triangle its lower half more than its upper one, a square nearly all.

    A decoder rounds corners off, which moves a square from 1 towards 0.86 and a triangle's halves from 0.5 apart to 0.3.
    """
    fillings, leanings = [], []
    for mask in masks:
        # A line of the box has at least two pixels in it, so that one stray pixel does not widen the box.
        rows, columns = np.flatnonzero(mask.sum(axis=1) > 1), np.flatnonzero(mask.sum(axis=0) > 1)
        if len(rows) > 1 and len(columns) > 1:
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            half = len(box) // 2
            fillings.append(box.mean())
            leanings.append(box[-half:].mean() - box[:half].mean())
    if not fillings or np.median(fillings) < 0.35:
        return "none"
    if abs(np.median(leanings)) > 0.2:
        return "triangle" if np.median(leanings) > 0 else "none"
    return "square" if np.median(fillings) > 0.845 else "circle" if np.median(fillings) > 0.65 else "none"


def scores(clips: list[NDArray[np.uint8]], scenes: list[Scene]) -> dict[str, float]:
    """Share of clips in which each attribute is right, and all of them."""
    found = [judge(clip) for clip in clips]
    right = {
        a: np.array([getattr(f, a) == getattr(s, a) for f, s in zip(found, scenes, strict=True)]) for a in ATTRIBUTES
    }
    every = np.all(list(right.values()), axis=0)
    return {a: float(values.mean()) for a, values in right.items()} | {"all": float(every.mean())}


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--schedule", "schedules", multiple=True, help="May be given more than once; the default schedule if not."
)
@click.option("--guidance-scale", type=float)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--every", type=click.IntRange(1), default=1, help="Take every n-th prompt only.")
@click.option("--save", type=click.Path(path_type=Path), help="A folder for the clips, as .npy.")
def main(
    model: Path,
    schedules: tuple[str, ...],
    guidance_scale: float | None,
    seeds: str,
    every: int,
    save: Path | None,
) -> None:
    """Sample MODEL with the PyTorch reference and print the scores as JSON."""
    from pyrexport.export.reference import Reference
    from pyrexport.runtime.checkpoint import read_checkpoint
    from pyrexport.runtime.sampler import sample

    checkpoint = read_checkpoint(model)
    reference = Reference(checkpoint)
    words = prompts()[::every]
    text = reference.encode([*words, checkpoint.model.negative_prompt])
    for name in schedules or (None,):
        plan = checkpoint.model.schedule(name, guidance_scale=guidance_scale)
        result: dict[str, object] = {"schedule": plan.name, "guidance_scale": plan.guidance_scale}
        for seed in map(int, seeds.split(",")):
            clips = []
            for i in track(range(len(words)), f"{plan.name}, seed {seed}"):
                latent = sample(
                    checkpoint.model.pyramid,
                    reference,
                    text[i],
                    plan,
                    negative_text=text[-1],
                    seed=1000 * seed + i,
                )
                clips.append(reference.decode(latent))
            result[f"seed {seed}"] = scores(clips, list(SCENES[::every]))
            if save is not None:
                save.mkdir(parents=True, exist_ok=True)
                np.save(save / f"{plan.name}-{seed}.npy", np.stack(clips))
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
