"""`pyrexport sample`: prompts to videos, from a bundle or, with the PyTorch reference, from a checkpoint."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.opening import is_bundle
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.sampler import Step, sample
from ..runtime.chain.schedules import Schedule, parse_levels
from ..runtime.documents import read_json
from ..runtime.errors import UsageError
from ..runtime.pipeline.pipeline import Pipeline, load, require_finite
from ..runtime.pipeline.video import (
    check_output,
    contact_sheet,
    has_video_writer,
    open_frames,
    save_array,
    write_png,
    written_beside,
)
from .common import (
    ResolutionType,
    engine_options,
    output_options,
    print_json,
    progress,
    read_prompts,
    resolve_checkpoint,
    sampling_options,
)

Frames = NDArray[np.uint8]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to show.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A file with a prompt a line; OUTPUT is a folder then."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=".mp4; .npy for latents; without PyAV a folder for PNG, or .npz for frames.")  # fmt: skip
@click.option("--grid", is_flag=False, flag_value="", default=None, metavar="[FILE]", help="Also a PNG contact sheet, by default beside the output.")  # fmt: skip
@click.option("--save-latents", type=click.Path(path_type=Path), help="Also the latents, as .npy.")
@click.option("--resolution", type=ResolutionType(), help="Of a checkpoint; a bundle's is fixed.")
@click.option("--resident", is_flag=True, help="Keep all engines of a bundle open.")
@engine_options
@sampling_options
@output_options
def command(
    model: Path, prompt: str | None, prompts: Path | None, output: Path, grid: str | None, save_latents: Path | None,
    resolution: Resolution | None, engine: EngineOptions, resident: bool, negative_prompt: str | None,
    guidance_scale: float | None, schedule: str | None, levels: str | None, seed: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Sample a video from MODEL, a bundle or a checkpoint."""
    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt or --prompts")
    if seed < 0:
        raise UsageError(f"a seed is a whole number from 0, found {seed}")
    many = prompts is not None
    words = read_prompts(prompts) if prompts is not None else [prompt or ""]
    jobs = _jobs(words, output, grid, save_latents, many)
    how = {"name": schedule, "guidance_scale": guidance_scale, "levels": None if levels is None else parse_levels(levels)}  # fmt: skip
    results = []
    with _sampler(model, resolution, engine, resident) as (description, parts, identity, run):
        _check_parts(model, parts, jobs)
        plan = description.schedule(**how)
        negative = description.negative_prompt if negative_prompt is None else negative_prompt
        if many:
            _claim_folder(output, {
                "model": str(model.resolve()), "weights": identity,
                "resolution": str(description.pyramid.resolution), "prompts": words, "seed": seed, "negative_prompt": negative,
                "levels": [list(group) for group in plan.levels], "guidance_scale": plan.guidance_scale,
            })  # fmt: skip
        for job in jobs:
            result: dict[str, Any] = {
                "prompt": job.prompt, "seed": seed, "schedule": plan.name, "levels": plan.levels,
                "guidance_scale": plan.guidance_scale, "files": [str(path) for path in job.files],
            }  # fmt: skip
            results.append(result)
            if many and all(path.exists() for path in job.files):
                result["kept"] = True
                continue  # a run over a file of prompts goes on where it stopped
            start = time.perf_counter()
            with progress(quiet) as bar:
                run(job, plan, negative, seed, _stage_bars(bar, description.pyramid, plan))
            seconds = result["seconds"] = time.perf_counter() - start
            if not as_json:
                files = ", ".join(map(str, job.files))
                click.echo(f"{files}: schedule {plan.name}, seed {seed}, {seconds:.1f} s")
    if as_json:
        print_json({"samples": results} if many else results[0])


class _Job:
    """A prompt and the files that it becomes."""

    def __init__(self, prompt: str, output: Path, sheet: Path | None, latents: Path | None) -> None:
        self.prompt, self.output, self.sheet, self.latents = prompt, output, sheet, latents
        self.files = [path for path in (output, sheet, latents) if path is not None]
        self.latent_only = output.suffix == ".npy"

    def check(self) -> None:
        """Refuse before the work what could not be written after it."""
        if self.output.suffix not in (".mp4", ".npy", ".npz", ""):
            raise UsageError(
                f"expected an output that ends in .mp4, in .npy for latents or .npz for frames, or a folder for PNG; "
                f"found '{self.output.name}'"
            )
        if self.output.suffix == ".mp4" and not has_video_writer():
            raise UsageError(
                "writing mp4 needs PyAV: pip install 'pyrexport[video]', or give a folder for PNG files or a .npz"
            )
        if self.sheet is not None and (self.latent_only or self.sheet.suffix != ".png"):
            raise UsageError(
                f"a contact sheet is a .png beside a video; found '{self.sheet.name}' for '{self.output.name}'"
            )
        if self.latents is not None and self.latent_only:
            raise UsageError(f"'{self.output.name}' holds the latents already: --save-latents is for videos")
        if self.latents is not None and self.latents.suffix != ".npy":
            raise UsageError(f"latents are written as .npy, found '{self.latents.name}'")


def _jobs(prompts: list[str], output: Path, grid: str | None, latents: Path | None, many: bool) -> list[_Job]:
    if not many:
        sheet = None if grid is None else Path(grid) if grid else output.with_suffix(".png")
        jobs = [_Job(prompts[0], output, sheet, latents)]
        for path in jobs[0].files:
            check_output(path, folder=path.suffix == "")
        if not output.suffix and output.is_dir() and any(output.iterdir()):
            raise UsageError(f"{output} is not empty: frames go to a folder of their own; choose another")
    else:
        if grid or latents is not None:
            raise UsageError(
                "with --prompts, give --grid without a file, and no --save-latents: files are named by number"
            )
        if output.suffix:
            raise UsageError(f"with --prompts the output is a folder, found '{output.name}'")
        suffix = ".mp4" if has_video_writer() else ".npz"
        names = [output / f"{index:04d}{suffix}" for index in range(len(prompts))]
        sheets = [None if grid is None else name.with_suffix(".png") for name in names]
        jobs = [_Job(*parts, None) for parts in zip(prompts, names, sheets, strict=True)]
        check_output(output, folder=True)
    for job in jobs:
        job.check()
    return jobs


def _check_parts(model: Path, parts: set[str], jobs: list[_Job]) -> None:
    if "text encoder" not in parts:
        raise UsageError(f"{model} has no text encoder: sample it from Python, with prompt_embeds")
    if "VAE" not in parts and not all(job.latent_only for job in jobs):
        raise UsageError(f"{model} has no VAE: only latents can be written; give an output that ends in .npy")


def _claim_folder(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run over many prompts, or make sure that what is there belongs to the same run.

    Raises:
        UsageError: the folder holds something else.
    """
    output.mkdir(exist_ok=True)
    file = output / "samples.json"
    if file.is_file():
        if read_json(file) != settings:
            raise UsageError(f"{output} holds samples of other prompts or settings: choose another folder")
    elif any(output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no samples.json: choose another folder")
    else:
        with written_beside(file) as partial:
            partial.write_text(json.dumps(settings, indent=1), "utf-8")


def _stage_bars(bar: Progress, pyramid: Any, plan: Schedule) -> Callable[[Step], None]:
    tasks = {
        stage.index: bar.add_task(f"stage {stage.index}", total=steps)
        for stage, steps in zip(reversed(pyramid.stages), plan.steps, strict=True)
    }
    return lambda step: bar.advance(tasks[step.stage])


@contextmanager
def _sampler(
    model: Path, resolution: Resolution | None, engine: EngineOptions, resident: bool
) -> Iterator[tuple[Any, set[str], str | None, Callable[..., None]]]:
    """The model's description, which optional parts it has, a hash of a bundle's files, and a function that does a job."""
    if is_bundle(model):
        if resolution is not None:
            raise UsageError(f"{model} is a bundle, whose resolution is fixed: build one at {resolution}")
        with load(model, resident=resident, **vars(engine)) as pipeline:
            manifest = pipeline.bundle.manifest
            parts = {name for name, there in (("text encoder", manifest.text), ("VAE", manifest.vae)) if there}
            hashes = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()))
            weights = hashlib.sha256(hashes.encode()).hexdigest()
            yield pipeline.model, parts, weights, lambda *job: _run_bundle(pipeline, *job)
    else:
        if engine.prepack or engine.provider or resident:
            raise UsageError(
                f"{model} is a checkpoint, which PyTorch runs: --prepack, --provider and --resident are for bundles"
            )
        checkpoint = resolve_checkpoint(model, resolution)
        parts = {
            name for name, tensors in (("text encoder", checkpoint.text_encoder), ("VAE", checkpoint.vae)) if tensors
        }
        yield checkpoint.model, parts, None, _Reference(checkpoint, engine.threads).run


def _run_bundle(
    pipeline: Pipeline, job: _Job, plan: Schedule, negative: str, seed: int, advance: Callable[[Step], None]
) -> None:
    picked: list[Frames] = []
    common: dict[str, Any] = {
        "negative_prompt": negative, "levels": [list(group) for group in plan.levels], "guidance_scale": plan.guidance_scale,
        "seed": seed, "callback": advance,
    }  # fmt: skip
    if job.latent_only:
        save_array(job.output, pipeline(job.prompt, output_type="latent", **common).latents)
        return
    with open_frames(job.output) as write:

        def take(frames: Frames) -> None:
            write(frames)
            if job.sheet is not None:
                picked.append(frames)

        latents = pipeline(job.prompt, on_frames=take, **common).latents
    _write_extras(job, latents, picked)


def _write_extras(job: _Job, latents: NDArray[np.float32], frames: list[Frames]) -> None:
    if job.sheet is not None:
        write_png(job.sheet, contact_sheet([np.concatenate(frames)]))
    if job.latents is not None:
        save_array(job.latents, latents)


class _Reference:
    """Jobs done by the PyTorch reference."""

    def __init__(self, checkpoint: Any, threads: int) -> None:
        self.checkpoint, self.threads = checkpoint, threads
        self.reference: Any = None

    def run(self, job: _Job, plan: Schedule, negative: str, seed: int, advance: Callable[[Step], None]) -> None:
        """Sample and write."""
        checkpoint = self.checkpoint
        import torch

        from ..export.reference.reference import Reference

        if self.threads:
            torch.set_num_threads(self.threads)
        reference = self.reference = self.reference or Reference(checkpoint)
        text = reference.encode([job.prompt, negative] if plan.guided else [job.prompt])
        latent = sample(
            checkpoint.model.pyramid, reference, text[0], plan,
            negative_text=text[-1] if plan.guided else None, seed=seed, callback=advance,
        )  # fmt: skip
        require_finite(latent, "the latents of this run")
        if job.latent_only:
            save_array(job.output, latent)
            return
        frames = reference.decode(latent)
        with open_frames(job.output) as write:
            write(frames)
        _write_extras(job, latent, [frames])
