"""`pyrexport decode`: latents that `sample` left, to their video."""

import time
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.opening import open_bundle
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import UsageError
from ..runtime.pipeline.chunks import frame_count, split
from ..runtime.pipeline.latents import Origin, origin_file, read_latents, read_origin
from ..runtime.pipeline.pipeline import load
from .common import PATH, decoder_option, engine_options, output_options, print_json, progress, require_bundle
from .finishing import decode_latents
from .hub import find_model
from .jobs import make_jobs
from .samplers import BundleSampler
from .videos import VideoOptions, video_options

OUTPUT_HELP = ".mp4; without PyAV a folder for PNG, or .npz for frames."


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("latents", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help=OUTPUT_HELP)
@video_options
@decoder_option
@engine_options
@output_options
def command(
    bundle: Path,
    latents: Path,
    output: Path,
    video: VideoOptions,
    decoder: str | None,
    engine: EngineOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Decode LATENTS, a .npy that BUNDLE's model sampled, as `sample` does."""
    (job,) = make_jobs([""], output, video, None, many=False)
    if job.latent_only:
        raise UsageError(f"expected an output that ends in .mp4 or .npz, or a folder for PNG; found '{output.name}'")
    bundle = find_model(bundle, quiet=quiet)
    require_bundle(bundle)
    origin = read_origin(latents)
    opening: dict[str, Any] = {"resolution": _resolution(bundle, origin), "decoder": decoder}
    with load(bundle, threads=engine.threads, **opening, **engine.own) as pipeline:
        sampler = BundleSampler(pipeline)
        if not sampler.has_decoder:
            raise UsageError(f"{bundle} has no VAE: decode with a bundle of the same model that has one")
        found = read_latents(latents, pipeline.bundle.manifest)
        if origin is None:
            beside = origin_file(latents).name
            click.echo(f"Warning: {latents} may be another model's: nothing beside it ({beside}) says which", err=True)
        chunks = split(found, sampler.model, sampler.resolution)
        start = time.perf_counter()
        with progress(quiet) as bar:
            decode_latents(job, sampler, chunks, len(chunks), video, bar)
        seconds = time.perf_counter() - start
    files, run = [str(path) for path in job.files], None if origin is None else dict(origin.run)
    if as_json:
        print_json({"latents": str(latents), "files": files, "seconds": seconds, "run": run})
    else:
        count = frame_count(len(chunks), sampler.resolution, sampler.model.pyramid.geometry)
        click.echo(f"{', '.join(files)}: {count} frames, {seconds:.1f} s")


def _resolution(bundle: Path, origin: Origin | None) -> Resolution | None:
    """That of the latents, where the bundle has it."""
    if origin is not None and origin.resolution in open_bundle(bundle).manifest.resolutions:
        return origin.resolution
    return None
