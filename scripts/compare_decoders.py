"""What the tiny decoder of the demonstration costs: the same latents decoded by both, and the judge's scores of either.

    python scripts/compare_decoders.py BUNDLE [--schedule NAME] [--seed 0] [--every 1] [--picture OUT.png]

The picture is of the first prompt's video: a row by the VAE's decoder, one by the tiny one, four times the difference.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import pyrexport
from judge_shapes import scores
from moving_shapes import SCENES, prompts
from pyrexport.runtime.pipeline.decoder import decode, frames_from
from pyrexport.runtime.pipeline.video import contact_sheet, write_png
from pyrexport.runtime.proof.metrics import psnr
from pyrexport.runtime.quantisation import DECODERS
from rich.progress import track

TIMES = 4
"""How much stronger differences are shown."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--schedule")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=1, help="Take every n-th prompt only.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also a .png of the first video by both.")
def main(bundle: Path, schedule: str | None, seed: int, every: int, picture: Path | None) -> None:
    """Sample BUNDLE, decode by each of its decoders, and print scores, PSNR and seconds as JSON."""
    words, scenes = prompts()[::every], list(SCENES[::every])
    clips: dict[str, list[np.ndarray]] = {name: [] for name in DECODERS}
    seconds, peaks = dict.fromkeys(DECODERS, 0.0), list[float]()
    with pyrexport.load(bundle, resident=True) as pipeline:
        for index, prompt in enumerate(track(words)):
            sampled = pipeline(prompt, schedule=schedule, seed=1000 * seed + index, output_type="latent")
            for name in DECODERS:
                decoder = pipeline.bundle.manifest.decoding(name).decoder
                start = time.perf_counter()
                video = [frames_from(frames) for frames in decode(pipeline.graphs, sampled.latents, decoder)]
                seconds[name] += time.perf_counter() - start
                clips[name].append(np.concatenate(video))
            peaks.append(psnr(clips["tiny"][-1], clips["full"][-1]))
    if picture is not None:
        full, tiny = (clips[name][0].astype(int) for name in ("full", "tiny"))
        apart = np.minimum(TIMES * abs(full - tiny), 255)
        write_png(picture, contact_sheet([rows.astype(np.uint8) for rows in (full, tiny, apart)]))
    result = {name: {**scores(clips[name], scenes), "seconds": seconds[name]} for name in DECODERS}
    click.echo(json.dumps({**result, "psnr": {"median": float(np.median(peaks)), "least": min(peaks)}}))


if __name__ == "__main__":
    main()
