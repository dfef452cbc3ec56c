"""`pyrexport parity`: a bundle against its checkpoint, or against a trace recorded from it."""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.manifest import MANIFEST_FILE, signed
from ..runtime.bundle.opening import is_bundle
from ..runtime.bundle.tiles import parse_tile
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.schedules import parse_levels
from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.pipeline.video import check_output, written_beside
from ..runtime.proof.parity import check_parity
from ..runtime.proof.trace import Trace
from .common import (
    Bars,
    engine_options,
    output_options,
    print_json,
    print_table,
    progress,
    read_prompts,
    resolve_checkpoint,
)

DEFAULT_PROMPTS = ("a red circle moving left", "Two cats box on a stage, in the style of an old film.")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--reference", type=click.Path(path_type=Path), help="The checkpoint: record and compare in one go.")
@click.option("--trace", type=click.Path(path_type=Path), help="A recorded trace: no PyTorch and no checkpoint is needed.")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path), help="Record a trace of the reference into this file.")
@click.option("--prompt", "prompts", multiple=True, help="May be given more than once.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="A file with a prompt a line.")
@click.option("--seed", "seeds", type=click.IntRange(0, MAX_INTEGER), multiple=True, default=(0,), show_default=True)
@click.option("--schedule", help="Of the recorded runs.")
@click.option("--levels", help="Explicit natural levels of the recorded runs.")
@click.option("--guidance-scale", type=float)
@click.option("--negative-prompt")
@click.option("--vae-tile", help="HEIGHTxWIDTH: record for bundles that decode in such tiles, in latent pixels.")
@click.option("--decode/--no-decode", default=True, help="Also compare videos.")
@click.option("--bisect", is_flag=True, help="Name the first block that diverges; needs --reference.")
@click.option("--graph", is_flag=True, help="Compare the networks that TensorRT's engines were built from, without a GPU; needs --reference.")  # fmt: skip
@click.option("--store", is_flag=True, help="Keep the result in the bundle's manifest.")
@engine_options
@output_options
def command(
    bundle: Path | None, reference: Path | None, trace: Path | None, record: Path | None, prompts: tuple[str, ...],
    prompts_file: Path | None, seeds: tuple[int, ...], schedule: str | None, levels: str | None,
    guidance_scale: float | None, negative_prompt: str | None, vae_tile: str | None, decode: bool, bisect: bool, graph: bool,
    store: bool, engine: EngineOptions, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compare BUNDLE with a reference. Exit code 1 if any level is out of tolerance."""
    asked = (prompts or None, prompts_file, schedule, levels, negative_prompt, vae_tile)
    recording = any(value is not None for value in asked) or not decode
    if prompts and prompts_file:
        raise UsageError("give either --prompt or --prompts")
    if bundle is not None and vae_tile is not None:
        raise UsageError("--vae-tile is for a trace without a bundle: a bundle has its own tile")
    _check_usage(
        bundle, reference, trace, record, bisect, graph, recording or guidance_scale is not None or seeds != (0,)
    )
    words = read_prompts(prompts_file) if prompts_file else list(prompts or DEFAULT_PROMPTS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        path = trace or record or Path(folder) / "trace.safetensors"
        pipeline = None
        if bundle is not None:  # first: a reference may take hours
            pipeline = opened.enter_context(_open(bundle, engine, reference if graph else None, Path(folder), quiet))
        if reference is not None:
            how = (schedule, None if levels is None else parse_levels(levels), guidance_scale, negative_prompt)
            tile = None if vae_tile is None else parse_tile(vae_tile)
            resolution = None
            if bundle is not None:
                resolution, tile = _sizes(bundle)
            _record(reference, path, words, seeds, how, decode, resolution, tile, quiet)
        if bundle is None:
            if as_json:
                print_json({"trace": str(path), "bytes": path.stat().st_size})
            else:
                click.echo(f"{path}: {path.stat().st_size:,} bytes")
            return
        assert pipeline is not None
        recorded = Trace(path)
        result = _compare(pipeline, recorded, quiet)
        if bisect and not result["levels"]["stages"]["passed"]:
            assert reference is not None
            result["bisect"] = _bisect(pipeline, reference, recorded, result)
    if store:
        _store(bundle, result, "graph_parity" if graph else "parity")
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not result["passed"]:
        failed = [name for name, level in result["levels"].items() if not level["passed"]]
        raise CheckFailed(f"parity failed: {', '.join(failed)} out of tolerance for {result['precision']}")


def _check_usage(
    bundle: Path | None, reference: Path | None, trace: Path | None, record: Path | None, bisect: bool, graph: bool,
    recording: bool,
) -> None:  # fmt: skip
    if bundle is not None and not is_bundle(bundle):
        raise UsageError(f"{bundle} is not a bundle: expected a folder with {MANIFEST_FILE}")
    if (reference is None) == (trace is None):
        raise UsageError("give either --reference CHECKPOINT or --trace FILE")
    if bundle is None and record is None:
        raise UsageError("give a BUNDLE to compare, or --record FILE to record a trace")
    if record is not None and reference is None:
        raise UsageError("--record needs --reference CHECKPOINT: a trace is recorded from it")
    if graph and (bundle is None or reference is None or bisect):
        raise UsageError("--graph needs a BUNDLE and --reference CHECKPOINT, and leaves --bisect out")
    if bisect and reference is None:
        raise UsageError("--bisect needs --reference CHECKPOINT: the blocks are compared with it")
    if trace is not None and recording:
        raise UsageError("prompts, seeds, schedules and guidance belong to recording: a trace has its own")
    if record is not None:
        check_output(record)


def _open(bundle: Path, engine: EngineOptions, networks: Path | None, folder: Path, quiet: bool) -> Pipeline:
    """The bundle's own engines, or its networks made again from a checkpoint."""
    if networks is None:
        pipeline = load(bundle, resident=True, **vars(engine))
        if pipeline.target.GROUPING == "profiles":
            pipeline.open("stage0")  # is there a GPU
        return pipeline
    from ..export.proof.networks import graph_pipeline
    from ..runtime.bundle.opening import open_bundle

    opened = open_bundle(bundle)
    checkpoint = resolve_checkpoint(networks, opened.manifest.model.pyramid.resolution)
    place = folder / "networks"
    place.mkdir()
    with progress(quiet) as bar:
        return graph_pipeline(opened, checkpoint, place, engine, Bars(bar))


def _sizes(bundle: Path) -> tuple[Resolution, tuple[int, int] | None]:
    """Resolution and tile of a bundle: its reference is sampled and decoded at the same ones."""
    from ..runtime.bundle.opening import open_bundle

    manifest = open_bundle(bundle).manifest
    return manifest.model.pyramid.resolution, manifest.vae.tiles.tile if manifest.vae else None


def _record(
    reference: Path, path: Path, prompts: list[str], seeds: tuple[int, ...], how: tuple[Any, ...], decode: bool,
    resolution: Resolution | None, tile: tuple[int, int] | None, quiet: bool,
) -> None:  # fmt: skip
    checkpoint = resolve_checkpoint(reference, resolution)
    name, levels, guidance_scale, negative = how
    plan = checkpoint.model.schedule(name, levels=levels, guidance_scale=guidance_scale)
    from ..export.reference.record import PROBES, record_trace

    total = len(PROBES) * checkpoint.model.pyramid.depth + len(prompts) * len(seeds) * sum(plan.steps)
    with progress(quiet) as bar:
        task = bar.add_task("reference", total=total)
        record_trace(
            checkpoint, path, prompts=prompts, seeds=seeds, schedule=plan,
            negative_prompt=checkpoint.model.negative_prompt if negative is None else negative,
            decode=decode, vae_tile=tile, advance=lambda: bar.advance(task),
        )  # fmt: skip


def _compare(pipeline: Pipeline, trace: Trace, quiet: bool) -> dict[str, Any]:
    runs = len(trace.runs)
    steps = sum(len(group) for group in trace.runs[0].levels) if runs else 0
    texts = len({run.prompt for run in trace.runs} | {trace.negative_prompt, *trace.texts})
    totals = {"text": texts, "stages": len(trace.probes), "chain": 2 * runs * steps, "vae": 1, "video": runs}
    with progress(quiet) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        return check_parity(pipeline, trace, advance=lambda level: bar.advance(tasks[level]))


def _bisect(pipeline: Pipeline, reference: Path, trace: Trace, result: dict[str, Any]) -> dict[str, Any]:
    from ..export.proof.bisect import first_divergence

    checkpoint = resolve_checkpoint(reference, pipeline.model.pyramid.resolution)
    return first_divergence(pipeline, checkpoint, trace, result["levels"]["stages"]["worst_stage"])


def _store(bundle: Path, result: dict[str, Any], field: str) -> None:
    """Sign the manifest again, with the result in it."""
    path = bundle / MANIFEST_FILE
    document = json.loads(path.read_text("utf-8"))
    document[field] = {"passed": result["passed"], "levels": {
        name: {key: value for key, value in level.items() if isinstance(value, (int, float, bool))}
        for name, level in result["levels"].items()
    }}  # fmt: skip
    with written_beside(path) as partial:
        partial.write_text(json.dumps(signed(document), indent=1, ensure_ascii=False), "utf-8")


def _show(result: dict[str, Any]) -> None:
    rows = []
    for name, level in result["levels"].items():
        verdict = "pass" if level["passed"] else "FAIL"
        if name == "video":
            rows.append([name, f"PSNR {level['psnr']:.1f} dB", f"SSIM {level['ssim']:.6f}", "", f">= {level['tolerance']:g} dB", verdict])  # fmt: skip
            continue
        rows.append([
            name, f"{level['relative_l2']:.2e}", f"{level['max_abs']:.2e}", f"{level['cosine']:.9f}",
            f"<= {level['tolerance']:g}", verdict,
        ])  # fmt: skip
        if name == "chain":
            forced = level["teacher_forced"]
            rows.append(["  teacher-forced", f"{forced['relative_l2']:.2e}", f"{forced['max_abs']:.2e}", f"{forced['cosine']:.9f}", "", ""])  # fmt: skip
    print_table(f"parity, {result['precision']}", ["level", "relative L2", "max abs", "cosine", "tolerance", ""], rows)
    growth = result["levels"]["chain"]["growth"]
    if growth:
        click.echo("free-running error after each step: " + " ".join(f"{value:.1e}" for value in growth[0]))
    if "bisect" in result:
        found = result["bisect"]
        click.echo(f"stage {found['stage']}: first divergence at {found['first'] or 'no block of this probe'}")
