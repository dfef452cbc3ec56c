"""`pyrexport sample`: prompts to videos, from a bundle or, with the PyTorch reference, from a checkpoint."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from ..runtime.bundle.engines import EngineOptions
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.sampler import Step
from ..runtime.chain.schedules import Schedule, parse_levels
from ..runtime.errors import UsageError
from .common import (
    PATH,
    ResolutionType,
    engine_options,
    output_options,
    print_json,
    progress,
    read_prompts,
    sampling_options,
)
from .jobs import Job, claim_folder, make_jobs
from .samplers import Sampler, open_sampler

OUTPUT_HELP = ".mp4; .npy for latents; without PyAV a folder for PNG, or .npz for frames."


@click.command()
@click.argument("model", type=PATH)
@click.option("--prompt", help="What to show.")
@click.option("--prompts", type=PATH, help="A file with a prompt a line; OUTPUT is a folder then.")
@click.option("-o", "--output", type=PATH, required=True, help=OUTPUT_HELP)
@click.option(
    "--grid",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[FILE]",
    help="Also a PNG contact sheet, by default beside the output.",
)
@click.option("--save-latents", type=PATH, help="Also the latents, as .npy.")
@click.option("--resolution", type=ResolutionType(), help="Of a checkpoint; a bundle's is fixed.")
@click.option("--resident", is_flag=True, help="Keep all engines of a bundle open.")
@engine_options
@sampling_options
@output_options
def command(
    model: Path,
    prompt: str | None,
    prompts: Path | None,
    output: Path,
    grid: str | None,
    save_latents: Path | None,
    resolution: Resolution | None,
    engine: EngineOptions,
    resident: bool,
    negative_prompt: str | None,
    guidance_scale: float | None,
    schedule: str | None,
    levels: str | None,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sample a video from MODEL, a bundle or a checkpoint."""
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt or --prompts")
    if seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed}")
    words = read_prompts(prompts) if prompts is not None else [prompt or ""]
    jobs = make_jobs(words, output, grid, save_latents, many=prompts is not None)
    explicit = None if levels is None else parse_levels(levels)
    with open_sampler(model, resolution, engine, resident=resident) as sampler:
        _check_components(model, sampler, jobs)
        chosen = sampler.model.schedule(schedule, guidance_scale=guidance_scale, levels=explicit)
        negative = sampler.model.negative_prompt if negative_prompt is None else negative_prompt
        if prompts is not None:
            claim_folder(output, _settings(model, sampler, words, chosen, negative, seed))
        results = [
            _run(job, sampler, chosen, negative, seed, keep=prompts is not None, quiet=quiet, say=not as_json)
            for job in jobs
        ]
    if as_json:
        print_json({"samples": results} if prompts is not None else results[0])


def _run(
    job: Job,
    sampler: Sampler,
    schedule: Schedule,
    negative: str,
    seed: int,
    *,
    keep: bool,
    quiet: bool,
    say: bool,
) -> dict[str, Any]:
    """Do a job, unless its files are all there and may be kept: a run over many prompts goes on where it stopped."""
    result: dict[str, Any] = {
        "prompt": job.prompt,
        "seed": seed,
        "schedule": schedule.name,
        "levels": schedule.levels,
        "guidance_scale": schedule.guidance_scale,
        "files": [str(path) for path in job.files],
    }
    if keep and all(path.exists() for path in job.files):
        return {**result, "kept": True}
    start = time.perf_counter()
    with progress(quiet) as bar:
        sampler.run(job, schedule, negative, seed, _stage_bars(bar, schedule))
    seconds = time.perf_counter() - start
    if say:
        files = ", ".join(map(str, job.files))
        click.echo(f"{files}: schedule {schedule.name}, seed {seed}, {seconds:.1f} s")
    return {**result, "seconds": seconds}


def _check_components(model: Path, sampler: Sampler, jobs: list[Job]) -> None:
    if not sampler.has_text_encoder:
        raise UsageError(f"{model} has no text encoder: sample it from Python, with prompt_embeds")
    if not sampler.has_vae and not all(job.latent_only for job in jobs):
        raise UsageError(f"{model} has no VAE: only latents can be written; give an output that ends in .npy")


def _settings(
    model: Path, sampler: Sampler, prompts: list[str], schedule: Schedule, negative: str, seed: int
) -> dict[str, Any]:
    """What tells one run over many prompts from another."""
    return {
        "model": str(model.resolve()),
        "weights": sampler.weights,
        "resolution": str(sampler.resolution),
        "prompts": prompts,
        "seed": seed,
        "negative_prompt": negative,
        "levels": [list(group) for group in schedule.levels],
        "guidance_scale": schedule.guidance_scale,
        "solver": schedule.solver,
    }


def _stage_bars(bar: Progress, schedule: Schedule) -> Callable[[Step], None]:
    stages = reversed(range(len(schedule.steps)))
    tasks = {
        stage: bar.add_task(f"stage {stage}", total=steps) for stage, steps in zip(stages, schedule.steps, strict=True)
    }
    return lambda step: bar.advance(tasks[step.plan.stage.index])
