"""Judge clips of moving shapes without any learned part, and score a model over the 72 prompts.

    python scripts/score_moving_shapes.py MODEL [--schedule NAME] [--seeds 0,1] [--sheet FILE.png]

Colour is the hue of the shape, direction the way of its centroid, shape its area against its bounding box.
"""

import colorsys
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import click
import numpy as np
import pyrexport
from moving_shapes import COLOURS, DIRECTIONS, FRAMES, SCENES, SIZE, Scene, prompts
from numpy.typing import NDArray
from pyrexport.runtime.bundle.opening import is_bundle
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.errors import PyrexportError
from pyrexport.runtime.files import check_output
from pyrexport.runtime.model.description import Model
from pyrexport.runtime.pipeline.video import contact_sheet, write_png
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
    """By the share of its box that a shape fills: a square nearly all, a triangle its lower half above all.

    A decoder rounds corners off: a square goes from 1 towards 0.86, and a triangle's halves from 0.5 apart to 0.3.
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


Sampler = Callable[[str, str | None, float | None, int], NDArray[np.uint8]]
"""Prompt, schedule, guidance scale and seed to a clip."""


@contextmanager
def opened(model: Path) -> Iterator[tuple[Model, Resolution, Sampler]]:
    """A bundle, or a checkpoint sampled by the PyTorch reference: its model, its resolution, and what samples it."""
    if is_bundle(model):
        with pyrexport.load(model, resident=True) as pipeline:

            def run(prompt: str, schedule: str | None, guidance_scale: float | None, seed: int) -> NDArray[np.uint8]:
                frames = pipeline(prompt, schedule=schedule, guidance_scale=guidance_scale, seed=seed).frames
                assert frames is not None
                return frames

            yield pipeline.model, pipeline.bundle.manifest.resolution, run
        return
    from pyrexport.export.reference.reference import Reference
    from pyrexport.runtime.model.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(model)
    reference, pyramid = Reference(checkpoint), checkpoint.model.pyramid
    encode = cache(lambda prompt: {"text": reference.encode([prompt])[0]})

    def refer(prompt: str, schedule: str | None, guidance_scale: float | None, seed: int) -> NDArray[np.uint8]:
        chosen = checkpoint.model.schedule(schedule, guidance_scale=guidance_scale)
        steps, negative = plan(pyramid, checkpoint.resolution, chosen), encode(checkpoint.model.negative_prompt)
        latent = sample(steps, pyramid.taps, reference, encode(prompt), negative=negative, seed=seed)
        return reference.decode(latent)

    yield checkpoint.model, checkpoint.resolution, refer


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--schedule", "schedules", multiple=True, help="May be given more than once; the default schedule if not."
)
@click.option("--guidance-scale", type=float)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--every", type=click.IntRange(1), default=1, help="Take every n-th prompt only.")
@click.option("--sheet", type=click.Path(path_type=Path), help="A PNG with frames of every thirteenth clip.")
def main(
    model: Path,
    schedules: tuple[str, ...],
    guidance_scale: float | None,
    seeds: str,
    every: int,
    sheet: Path | None,
) -> None:
    """Sample MODEL, a checkpoint (by the PyTorch reference) or a bundle, and print the scores as JSON."""
    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise click.UsageError(f"--seeds are whole numbers from 0 with commas between, found '{seeds}'")
    try:
        if sheet is not None:
            check_output(sheet)
        score(model, schedules, guidance_scale, sorted(set(map(int, seeds.split(",")))), every, sheet)
    except PyrexportError as error:
        raise click.UsageError(str(error)) from None


def score(
    folder: Path,
    names: tuple[str, ...],
    guidance_scale: float | None,
    seeds: list[int],
    every: int,
    sheet: Path | None,
) -> None:
    """Print a line of scores per schedule."""
    words, scenes = prompts()[::every], list(SCENES[::every])
    with opened(folder) as (model, resolution, clip_of):
        if resolution != Resolution(FRAMES, SIZE, SIZE):
            raise click.UsageError(f"{folder} is not the demonstration: its clips are {resolution}")
        schedules = [model.schedule(name, guidance_scale=guidance_scale) for name in names or (None,)]
        for name, schedule in zip(names or (None,), schedules, strict=True):
            result: dict[str, object] = {"schedule": schedule.name, "guidance_scale": schedule.guidance_scale}
            for seed in seeds:
                clips = [
                    clip_of(prompt, name, guidance_scale, 1000 * seed + i)
                    for i, prompt in enumerate(track(words, f"{schedule.name}, seed {seed}"))
                ]
                result[f"seed {seed}"] = scores(clips, scenes)
                if sheet is not None:
                    write_png(sheet, contact_sheet(clips[:: max(1, 13 // every)]))
                    sheet = None
            click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
