"""What a pyramid's stages hand on: the demonstration's latents, decoded at the end of each stage and after renoising.

    python scripts/show_stages.py OUT.png [--prompt TEXT] [--seed 0] [--schedule 8-6-6]

Columns: the noise that a run begins with, then for each stage its last latent and, but for the finest, what the next
one begins with. Rows: three frames of the clip. Small frames are enlarged, so that all have one size.
"""

from itertools import pairwise
from pathlib import Path

import click
import numpy as np
from moving_shapes import SIZE
from numpy.typing import NDArray
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import Step, sample
from pyrexport.runtime.errors import PyrexportError
from pyrexport.runtime.files import check_output
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.runtime.pipeline.video import write_png

DEMONSTRATION = Path(__file__).resolve().parent.parent / "tests" / "data" / "moving-shapes"
SHOWN = (0.0, 0.5, 1.0)
"""Frames that are shown, by their place in the clip."""


def latents_of(checkpoint: Checkpoint, reference: Reference, prompt: str, schedule: str, seed: int) -> list[NDArray]:
    """Latents [C, T, H, W]: of the start, and of each stage's end with what follows from it."""
    model, taken = checkpoint.model, list[Step]()
    steps = plan(model.pyramid, checkpoint.resolution, model.schedule(schedule))
    text, negative = ({"text": embedded} for embedded in reference.encode([prompt, model.negative_prompt]))
    end = sample(steps, model.pyramid.taps, reference, text, negative=negative, seed=seed, callback=taken.append)
    jumps = [(before.latent, after.before) for before, after in pairwise(taken) if before.plan.changes_stage]
    return [taken[0].before, *(latent for jump in jumps for latent in jump), end]


def shown(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A column: some frames below each other, enlarged to the size of the video."""
    times = SIZE // frames.shape[1]
    chosen = [frames[round(place * (len(frames) - 1))] for place in SHOWN]
    return np.concatenate([frame.repeat(times, 0).repeat(times, 1) for frame in chosen])


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--prompt", default="a red circle moving left", show_default=True)
@click.option("--schedule", default="8-6-6", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(out: Path, prompt: str, schedule: str, seed: int) -> None:
    """Write the picture to OUT."""
    try:
        check_output(out)
        checkpoint = read_checkpoint(DEMONSTRATION)
        reference = Reference(checkpoint)
        columns = [
            shown(reference.decode(latent)) for latent in latents_of(checkpoint, reference, prompt, schedule, seed)
        ]
    except PyrexportError as error:
        raise click.UsageError(str(error)) from None
    write_png(out, np.concatenate(columns, axis=1))
    click.echo(f"{out}: {len(columns)} latents of '{prompt}', seed {seed}")


if __name__ == "__main__":
    main()
