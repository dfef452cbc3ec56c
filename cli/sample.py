"""`pyrexport sample`: a prompt to a video."""

import time
from pathlib import Path

import click
import numpy as np

from ..runtime.errors import UsageError
from ..runtime.pyramid import Resolution
from ..runtime.sampler import Step, sample
from ..runtime.schedules import parse_levels
from ..runtime.video import check_output, contact_sheet, open_video, write_png, written_beside
from .common import ResolutionType, output_options, print_json, progress, resolve_checkpoint, sampling_options


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="An .mp4, or .npy for latents.")
@click.option(
    "--grid",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[FILE]",
    help="Also a PNG contact sheet, by default beside the output.",
)
@click.option("--resolution", type=ResolutionType(), help="In place of the checkpoint's own.")
@sampling_options
@output_options
def command(
    model: Path, prompt: str, output: Path, grid: str | None, resolution: Resolution | None, negative_prompt: str | None,
    guidance_scale: float | None, schedule: str | None, levels: str | None, seed: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Sample a video from a CHECKPOINT with the PyTorch reference."""
    checkpoint = resolve_checkpoint(model, resolution)
    plan = checkpoint.model.schedule(
        schedule, guidance_scale=guidance_scale, levels=None if levels is None else parse_levels(levels)
    )
    if seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed}")
    if not checkpoint.text_encoder:
        raise UsageError(f"{model} has no text_encoder/ folder; sample it from Python with prompt_embeds")
    latent_only = output.suffix == ".npy"
    sheet = None if grid is None else Path(grid) if grid else output.with_suffix(".png")
    if sheet is not None and (latent_only or sheet.suffix != ".png"):
        raise UsageError(f"a contact sheet is a .png beside an .mp4; found '{sheet.name}' for '{output.name}'")
    for path in (output, sheet):
        if path is not None:
            check_output(path)
    if not latent_only and not checkpoint.vae:
        raise UsageError(f"{model} has no vae/ folder: only latents can be written; give an output that ends in .npy")
    if not latent_only and output.suffix != ".mp4":
        raise UsageError(f"expected an output that ends in .mp4, or in .npy for latents; found '{output.name}'")

    from ..export.reference import Reference

    start = time.perf_counter()
    reference = Reference(checkpoint)
    prompts = [prompt, negative_prompt if negative_prompt is not None else checkpoint.model.negative_prompt]
    text = reference.encode(prompts if plan.guided else prompts[:1])
    with progress(quiet) as bar:
        tasks = {
            stage.index: bar.add_task(f"stage {stage.index}", total=steps)
            for stage, steps in zip(reversed(checkpoint.model.pyramid.stages), plan.steps, strict=True)
        }

        def advance(step: Step) -> None:
            bar.advance(tasks[step.stage])

        latent = sample(
            checkpoint.model.pyramid, reference, text[0], plan,
            negative_text=text[1] if plan.guided else None, seed=seed, callback=advance,
        )  # fmt: skip
    written = [output]
    if latent_only:
        with written_beside(output) as partial:
            np.save(partial, latent)
    else:
        frames = reference.decode(latent)
        with open_video(output, *frames.shape[1:3]) as write:
            write(frames)
        if sheet is not None:
            write_png(sheet, contact_sheet([frames]))
            written.append(sheet)
    seconds = time.perf_counter() - start
    if as_json:
        print_json({
            "prompt": prompt, "seed": seed, "schedule": plan.name, "levels": plan.levels,
            "guidance_scale": plan.guidance_scale, "files": [str(path) for path in written], "seconds": seconds,
        })  # fmt: skip
    else:
        click.echo(f"{', '.join(map(str, written))}: schedule {plan.name}, seed {seed}, {seconds:.1f} s")
