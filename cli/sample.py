"""`pyrexport sample`: prompts to videos, from a bundle or, with the PyTorch reference, from a checkpoint."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.bundle.engines import EngineOptions
from ..runtime.chain.sampler import Step
from ..runtime.chain.schedules import Schedule, parse_levels
from ..runtime.errors import UsageError
from ..runtime.pipeline.chunks import chunk_count
from ..runtime.pipeline.latents import Origin
from ..runtime.quantisation import DECODERS
from .common import (
    PATH,
    decoder_option,
    engine_options,
    length_options,
    output_options,
    print_json,
    progress,
    read_prompts,
    sampling_options,
)
from .finishing import Finish
from .hub import find_model
from .jobs import Job, claim_folder, make_jobs
from .previews import PreviewFile
from .reading import Reading, reading_options
from .samplers import Request, Sampler, open_sampler
from .videos import VideoOptions, video_options

OUTPUT_HELP = ".mp4; .npy for latents; without PyAV a folder for PNG, or .npz for frames."


@click.command()
@click.argument("model", type=PATH)
@click.option("--prompt", help="What to show.")
@click.option("--prompts", type=PATH, help="A file with a prompt a line; OUTPUT is a folder then.")
@click.option("-o", "--output", type=PATH, required=True, help=OUTPUT_HELP)
@video_options
@click.option("--save-latents", type=PATH, help="Also the latents, as .npy, before they are decoded.")
@click.option("--preview", type=PATH, help="A small .png or .gif of what is coming, after each step.")
@click.option(
    "--preview-decoder",
    type=click.Choice(list(DECODERS)),
    help="Previews are the first frame, decoded after each stage's last step.",
)
@reading_options
@length_options
@click.option("--resident", is_flag=True, help="Keep all engines of a bundle open.")
@click.option("--no-cache", is_flag=True, help="Neither keep a bundle's embeddings of prompts nor take kept ones.")
@decoder_option
@engine_options
@sampling_options
@output_options
def command(
    model: Path,
    prompt: str | None,
    prompts: Path | None,
    output: Path,
    video: VideoOptions,
    save_latents: Path | None,
    preview: Path | None,
    preview_decoder: str | None,
    reading: Reading,
    engine: EngineOptions,
    resident: bool,
    no_cache: bool,
    decoder: str | None,
    length: Mapping[str, int | None],
    negative_prompt: str | None,
    guidance: Mapping[str, float | None],
    solver: str | None,
    schedule: str | None,
    levels: str | None,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sample a video from MODEL, a bundle or a checkpoint."""
    words = _words(prompt, prompts)
    _check_usage(preview, preview_decoder, seed)
    jobs = make_jobs(words, output, video, save_latents, many=prompts is not None)
    model = find_model(model, reading.weights.files.variant, quiet=quiet)
    with open_sampler(model, reading, engine, resident=resident, decoder=decoder, cache=not no_cache) as sampler:
        _check_components(model, sampler, jobs)
        chosen = sampler.model.schedule(schedule, levels=_levels(levels), solver=solver, **guidance)
        negative = sampler.model.negative_prompt if negative_prompt is None else negative_prompt
        show = None if preview is None else PreviewFile(preview, model, sampler, preview_decoder)
        chunks = chunk_count(sampler.model, sampler.resolution, **length)
        run = Run(Finish(model, sampler, video, decoder, chunks), chosen, negative, seed, show)
        if prompts is not None:
            claim_folder(output, run.settings(words))
        for job in jobs:
            run.finish.check(job, run.origin(job.prompt))
        warned = _warn(jobs, sampler, chosen, negative_prompt)
        how = {"keep": prompts is not None, "quiet": quiet, "say": not as_json}
        results = [_run(job, run, **how) | {"warnings": warned[job.output]} for job in jobs]
    if as_json:
        print_json({"samples": results} if prompts is not None else results[0])


def _levels(text: str | None) -> list[list[float]] | None:
    return None if text is None else parse_levels(text)


def _check_usage(preview: Path | None, preview_decoder: str | None, seed: int) -> None:
    if preview is None and preview_decoder is not None:
        raise UsageError("--preview-decoder is for --preview FILE")
    if seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed}")


def _words(prompt: str | None, prompts: Path | None) -> list[str]:
    if prompt is not None and prompts is None:
        return [prompt]
    if prompts is not None and prompt is None:
        return read_prompts(prompts)
    raise UsageError("give either --prompt or --prompts")


@dataclass(frozen=True)
class Run:
    """What the samples of a command line have in common."""

    finish: Finish
    schedule: Schedule
    negative: str
    seed: int
    show: PreviewFile | None

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other runs, but for the prompts."""
        chunks = {} if self.finish.chunks == 1 else {"chunks": self.finish.chunks}
        return chunks | {
            "model": str(self.finish.model.resolve()),
            "weights": self.finish.sampler.weights,
            "seed": self.seed,
            "negative_prompt": self.negative,
            "levels": [list(group) for group in self.schedule.levels],
            "scaled_start": self.schedule.scaled_start,
            "guidance_scale": self.schedule.guidance_scale,
            "guidance_scale_2": self.schedule.guidance_scale_2,
            "solver": self.schedule.solver.to_json(),
        }

    def settings(self, prompts: list[str]) -> dict[str, Any]:
        """What tells it from other runs over many prompts."""
        video = {"fps": self.finish.video.fps, "crf": self.finish.video.crf, "decoder": self.finish.decoder}
        return {**self.facts, "resolution": str(self.finish.sampler.resolution), "prompts": prompts, **video}

    def origin(self, prompt: str) -> Origin:
        """What is written beside latents."""
        facts = {"prompt": prompt, "schedule": self.schedule.name, **self.facts}
        sampler = self.finish.sampler
        return Origin(sampler.checkpoint_hash, sampler.resolution, json.loads(json.dumps(facts)))

    def latents(
        self, prompt: str, callback: Callable[[Step], None], past: NDArray[np.float32] | None
    ) -> Iterator[NDArray[np.float32]]:
        """Sample a prompt, chunk by chunk, after those that are known."""
        request = Request(self.schedule, self.negative, self.seed, self.finish.chunks)
        return self.finish.sampler.latents(prompt, request, callback, self.show, past)


def _run(job: Job, run: Run, *, keep: bool, quiet: bool, say: bool) -> dict[str, Any]:
    """Do a job, unless its files are all there and may be kept: a run over many prompts goes on where it stopped."""
    schedule = run.schedule
    result: dict[str, Any] = {
        "prompt": job.prompt,
        "seed": run.seed,
        "schedule": schedule.name,
        "levels": schedule.levels,
        "guidance_scale": schedule.guidance_scale,
        "guidance_scale_2": schedule.guidance_scale_2,
        "solver": schedule.solver.to_json(),
        "files": [str(path) for path in job.files],
    }
    if keep and all(path.exists() for path in job.files):
        run.finish.forget(job)
        return {**result, "kept": True}
    start = time.perf_counter()
    with progress(quiet) as bar:
        callback = _stage_bars(bar, schedule, run.finish.chunks)
        run.finish.run(job, run.origin(job.prompt), lambda past: run.latents(job.prompt, callback, past), bar)
    seconds, spent = time.perf_counter() - start, run.finish.sampler.preview_seconds
    if say:
        files = ", ".join(map(str, job.files))
        previews = f", {spent:.1f} s of it for previews" if spent else ""
        click.echo(f"{files}: schedule {schedule.name}, seed {run.seed}, {seconds:.1f} s{previews}")
    return {**result, "seconds": seconds, "preview_seconds": spent}


def _warn(jobs: list[Job], sampler: Sampler, schedule: Schedule, negative: str | None) -> dict[Path, tuple[str, ...]]:
    """Say on stderr, before the work, what there is to know of the prompts, each line once; returns them by output."""
    lines = {job.output: sampler.warnings(schedule, job.prompt, negative) for job in jobs}
    for line in dict.fromkeys(line for said in lines.values() for line in said):
        names = [output.name for output, said in lines.items() if line in said]
        of = "" if len(names) == len(jobs) else f"{', '.join(names)}: "
        click.echo(f"Warning: {of}{line}", err=True)
    return lines


def _check_components(model: Path, sampler: Sampler, jobs: list[Job]) -> None:
    if not sampler.has_text_encoder:
        raise UsageError(f"{model} has no text encoder: sample it from Python, with prompt_embeds")
    if not sampler.has_decoder and not all(job.latent_only for job in jobs):
        raise UsageError(f"{model} has no VAE: only latents can be written; give an output that ends in .npy")


def _stage_bars(bar: Progress, schedule: Schedule, chunks: int) -> Callable[[Step], None]:
    counts = [sum(map(len, levels)) for levels in zip(*map(schedule.levels_of, range(chunks)), strict=True)]
    stages = reversed(range(len(counts)))
    tasks = {stage: bar.add_task(f"stage {stage}", total=steps) for stage, steps in zip(stages, counts, strict=True)}
    return lambda step: bar.advance(tasks[step.plan.stage.index])
