"""Score a model over the 72 prompts of moving shapes.

    python scripts/score_moving_shapes.py MODEL [--schedule NAME] [--seeds 0,1] [--sheet FILE.png]

`overlap` is that of a frame's shape with the best fitting ideal one, in the mean.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import click
import numpy as np
import pyrexport
from judge_shapes import scores
from moving_shapes import FRAMES, SCENES, SIZE, prompts
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
