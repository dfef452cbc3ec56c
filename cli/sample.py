"""`pyrexport sample`: prompts to videos, from a bundle or, with the PyTorch reference, from a checkpoint."""

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from ..runtime.bundle.engines import EngineOptions
from ..runtime.chain.schedules import Schedule, parse_levels
from ..runtime.errors import UsageError
from ..runtime.pipeline.chunks import chunk_count
from ..runtime.quantisation import DECODERS
from .common import (
    PATH,
    decoder_option,
    engine_options,
    length_options,
    output_options,
    print_json,
    read_prompts,
    sampling_options,
)
from .hub import find_model
from .jobs import Job, claim_folder, make_jobs, unnamed_seed
from .many import Many, many_options
from .previews import PreviewFile
from .reading import Reading, reading_options
from .running import Run, RunOptions, do_job, do_jobs, open_worker
from .samplers import Sampler, open_sampler
from .videos import VideoOptions, video_options

OUTPUT_HELP = ".mp4; .npy for latents; without PyAV a folder for PNG, or .npz for frames."


@click.command()
@click.argument("model", type=PATH)
@click.option("--prompt", help="What to show.")
@many_options
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
@click.option("--resident/--no-resident", default=None, help="Keep a bundle's engines open; default: with --prompts.")
@click.option("--no-cache", is_flag=True, help="Neither keep a bundle's embeddings of prompts nor take kept ones.")
@decoder_option
@engine_options
@sampling_options
@output_options
def command(
    model: Path,
    prompt: str | None,
    many: Many,
    output: Path,
    video: VideoOptions,
    save_latents: Path | None,
    preview: Path | None,
    preview_decoder: str | None,
    reading: Reading,
    engine: EngineOptions,
    resident: bool | None,
    no_cache: bool,
    decoder: str | None,
    length: Mapping[str, int | None],
    negative_prompt: str | None,
    guidance: Mapping[str, float | None],
    solver: str | None,
    schedule: str | None,
    levels: str | None,
    seed: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sample a video from MODEL, a bundle or a checkpoint."""
    words, output, seeds = _words(prompt, many.prompts), many.cluster.path(output), many.seeds_of(seed)
    _check_usage(preview, preview_decoder, many, seed)
    out, unnamed = None if as_json else sys.stdout, unnamed_seed(output, seeds) if many.given else None
    jobs = make_jobs(words, output, video, save_latents, seeds=seeds, unnamed=unnamed, many=many.given)
    model = many.model(find_model(model, reading.weights.files.variant, quiet=quiet))
    stay = many.stay_open(model) if resident is None else resident
    opening = partial(open_sampler, model, reading, engine, resident=stay, decoder=decoder, cache=not no_cache)
    with opening() as sampler, many.cluster.connected(sampler.gpus) as spread:
        chosen = sampler.model.schedule(schedule, levels=_levels(levels), solver=solver, **guidance)
        negative = sampler.model.negative_prompt if negative_prompt is None else negative_prompt
        show = None if preview is None else PreviewFile(preview, model, sampler, preview_decoder)
        chunks = chunk_count(sampler.model, sampler.resolution, **length)
        options = RunOptions(model, video, decoder, chunks, chosen, negative, unnamed)
        run = options.start(sampler, show)
        warned = _begin(jobs, run, words if many.given else None, negative_prompt)
        start, do = time.perf_counter(), partial(do_job, run=run, keep=many.given, quiet=quiet)
        work = partial(open_worker, opening=opening, options=options, prompts=words)
        made = do_jobs(jobs, do, spread and partial(spread, work))
        results = {job: _said(result, chosen, out) | {"warnings": warned[job.output]} for job, result in made}
    _tell([results[job] for job in jobs], time.perf_counter() - start if many.given else None, as_json)


def _levels(text: str | None) -> list[list[float]] | None:
    return None if text is None else parse_levels(text)


def _check_usage(preview: Path | None, preview_decoder: str | None, many: Many, seed: int | None) -> None:
    if preview is None and preview_decoder is not None:
        raise UsageError("--preview-decoder is for --preview FILE")
    if preview is not None and many.cluster.address is not None:
        raise UsageError("--preview shows a video that is made here: leave it out with --ray")
    many.check(seed)


def _words(prompt: str | None, prompts: Path | None) -> list[str]:
    if prompt is not None and prompts is None:
        return [prompt]
    if prompts is not None and prompt is None:
        return read_prompts(prompts)
    raise UsageError("give either --prompt or --prompts")


def _begin(jobs: list[Job], run: Run, words: list[str] | None, negative: str | None) -> dict[Path, tuple[str, ...]]:
    """Refuse what the model cannot make or others' files are in the way of, and say what there is to know of prompts.

    Of many prompts, `words`, the folder is this run's from now on. What was said is returned, by output.
    """
    _check_components(run.finish.model, run.finish.sampler, run.finish.decoder, jobs)
    if words is not None:
        claim_folder(jobs[0].output.parent, run.settings(words))
    for job in jobs:
        run.finish.check(job, run.origin(job))
    return _warn(jobs, run.finish.sampler, run.schedule, negative)


def _warn(jobs: list[Job], sampler: Sampler, schedule: Schedule, negative: str | None) -> dict[Path, tuple[str, ...]]:
    """Say on stderr, before the work, what there is to know of the prompts, each line once; returns them by output."""
    lines = {job.output: sampler.warnings(schedule, job.prompt, negative) for job in jobs}
    for line in dict.fromkeys(line for said in lines.values() for line in said):
        names = [output.name for output, said in lines.items() if line in said]
        of = "" if len(names) == len(jobs) else f"{', '.join(names)}: "
        click.echo(f"Warning: {of}{line}", err=True)
    return lines


def _check_components(model: Path, sampler: Sampler, decoder: str | None, jobs: list[Job]) -> None:
    if not sampler.has_text_encoder:
        raise UsageError(f"{model} has no text encoder: sample it from Python, with prompt_embeds")
    if not sampler.has_decoder and not all(job.latent_only for job in jobs):
        raise UsageError(f"{model} has no VAE: only latents can be written; give an output that ends in .npy")
    if decoder is not None and all(job.latent_only for job in jobs):
        raise UsageError(f"'{jobs[0].output.name}' holds latents, which nothing decodes: leave out --decoder")


def _said(result: dict[str, Any], schedule: Schedule, out: TextIO | None) -> dict[str, Any]:
    """A job's result, of which people are told as soon as it is there."""
    if out is not None and not result.get("kept"):
        what = f"{', '.join(result['files'])}: schedule {schedule.words}, seed {result['seed']}"
        took = f", {result['seconds']:.1f} s" if "seconds" in result else ", by a worker that was lost after it"
        previews = f", {result['preview_seconds']:.1f} s of it for previews" if result.get("preview_seconds") else ""
        where = f", on {result['worker']}" if "worker" in result else ""
        click.echo(f"{what}{took}{previews}{where}", file=out)
    return result


def _tell(results: list[dict[str, Any]], seconds: float | None, as_json: bool) -> None:
    """What there is to say at the end; `seconds`: of a run over many prompts."""
    if seconds is None:
        if as_json:
            print_json(results[0])
        return
    kept = sum(result.get("kept", False) for result in results)
    made = len(results) - kept
    an_hour = made / seconds * 3600
    if as_json:
        rate = {"made": made, "kept": kept, "seconds": seconds, "videos_per_hour": an_hour}
        print_json({"samples": results, "throughput": rate})
        return
    left = f"; {kept} were there" if kept else ""
    click.echo(f"{made} made in {seconds:.1f} s, {an_hour:,.0f} an hour{left}")
