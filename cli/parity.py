"""`pyrexport parity`: a bundle against its checkpoint, or against a trace recorded from it."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.graphs import stage_key
from ..runtime.bundle.manifest import MANIFEST_FILE, signed
from ..runtime.bundle.opening import Bundle, open_bundle
from ..runtime.documents import read_json
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.files import write_whole
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.safetensors import check_tensors_output
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.proof.parity import check_parity
from ..runtime.proof.trace import Trace, Watch
from .common import PATH, Bars, engine_options, output_options, print_json, print_table, progress, require_bundle
from .hub import find_model
from .reading import require_same_loras, resolve_checkpoint
from .recording import Recording, recording_options
from .reports import (
    LEVEL_COLUMNS,
    FramePairs,
    Subject,
    check_page,
    level_rows,
    parity_page,
    parity_verdict,
    write_page,
)

TITLES = {"parity": "parity", "graph_parity": "parity of the networks that engines were built from"}
"""Of the page, by the field of the manifest that keeps the result."""


@click.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--reference", type=PATH, help="The checkpoint: record and compare in one go.")
@click.option("--trace", type=PATH, help="A recorded trace: no PyTorch and no checkpoint is needed.")
@click.option("--record", type=PATH, help="Record a trace of the reference into this file.")
@recording_options
@click.option("--vae-tile", help="HEIGHTxWIDTH: record for bundles that decode in such tiles, in latent pixels.")
@click.option("--decode/--no-decode", default=True, help="Also compare videos.")
@click.option("--bisect", is_flag=True, help="Name the first block and layer that diverge; needs --reference.")
@click.option(
    "--graph",
    is_flag=True,
    help="Compare the networks that engines were built from, without their device; needs --reference.",
)
@click.option("--recipe", type=PATH, help="With --graph: the recipe that BUNDLE was built by.")
@click.option("--store", is_flag=True, help="Keep the result in the bundle's manifest.")
@click.option("--html", type=PATH, help="A page to look at: levels, curves and frames side by side.")
@engine_options
@output_options
def command(
    bundle: Path | None,
    reference: Path | None,
    trace: Path | None,
    record: Path | None,
    bisect: bool,
    graph: bool,
    recipe: Path | None,
    store: bool,
    html: Path | None,
    engine: EngineOptions,
    as_json: bool,
    quiet: bool,
    **recording: Any,
) -> None:
    """Compare BUNDLE with a reference. Exit code 1 if any level is out of tolerance."""
    asked = Recording(**recording)
    _check_usage(bundle, reference, trace, record, html, asked)
    _check_proof(bundle, reference, bisect=bisect, graph=graph, recipe=recipe)
    bundle = bundle and find_model(bundle, quiet=quiet)
    reference = reference and find_model(reference, asked.weights.files.variant, quiet=quiet)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        path = trace or record or Path(folder) / "trace.safetensors"
        pipeline = None
        if bundle is not None:  # first: a reference may take hours
            require_bundle(bundle)
            networks = (_checkpoint(reference, bundle, asked), recipe) if graph and reference else None
            chosen = {"resolution": asked.size_for([trace] if trace else []), "decoder": asked.decoder}
            pipeline = opened.enter_context(_open(bundle, chosen, engine, networks, Path(folder), quiet))
        if reference is not None:
            asked.write(reference, path, bundle, quiet)
        if bundle is None or pipeline is None:
            return _show_recorded(path, as_json)
        recorded, pairs = Trace(path), FramePairs()
        result = _compare(pipeline, recorded, None if reference is None else _ranges(pipeline), pairs, quiet)
        if bisect and reference is not None:
            result["bisect"] = _bisect(pipeline, reference, asked, recorded, result["levels"])
    kind = "graph_parity" if graph else "parity"
    if store:
        _store(pipeline.bundle, result, kind)
    _print(result, as_json)
    if html is not None:
        subject = Subject(bundle, pipeline.bundle.manifest, str(reference or trace), tuple(recorded.runs), engine)
        write_page(html, parity_page(subject, result, TITLES[kind], pairs))
    _require_passed(result)


def _check_usage(
    bundle: Path | None,
    reference: Path | None,
    trace: Path | None,
    record: Path | None,
    html: Path | None,
    asked: Recording,
) -> None:
    if asked.prompts and asked.prompts_file:
        raise UsageError("give either --prompt or --prompts")
    if bundle is not None and asked.vae_tile is not None:
        raise UsageError("--vae-tile is for a trace without a bundle: a bundle has its own tile")
    if (reference is None) == (trace is None):
        raise UsageError("give either --reference CHECKPOINT or --trace FILE")
    if bundle is None and record is None:
        raise UsageError("give a BUNDLE to compare, or --record FILE to record a trace")
    if record is not None and reference is None:
        raise UsageError("--record needs --reference CHECKPOINT: a trace is recorded from it")
    if trace is not None and asked != Recording(resolution=asked.resolution, decoder=asked.decoder):
        raise UsageError("prompts, seeds, schedules and guidance belong to recording: a trace has its own")
    if record is not None:
        check_tensors_output(record, "trace")
    if html is not None:
        if bundle is None:
            raise UsageError("--html shows a comparison: give a BUNDLE")
        check_page(html)


def _check_proof(
    bundle: Path | None, reference: Path | None, *, bisect: bool, graph: bool, recipe: Path | None
) -> None:
    if recipe is not None and not graph:
        raise UsageError("--recipe is for --graph: a bundle's own graphs hold what it says")
    if graph and (bundle is None or reference is None or bisect):
        raise UsageError("--graph needs a BUNDLE and --reference CHECKPOINT, and leaves --bisect out")
    if bisect and reference is None:
        raise UsageError("--bisect needs --reference CHECKPOINT: the blocks are compared with it")


@contextmanager
def _open(
    bundle: Path,
    chosen: Mapping[str, Any],
    engine: EngineOptions,
    networks: tuple[Checkpoint, Path | None] | None,
    folder: Path,
    quiet: bool,
) -> Iterator[Pipeline]:
    """The bundle's own engines, or its networks made again from a checkpoint, at what is chosen of `load`."""
    if networks is None:
        with load(bundle, resident=True, threads=engine.threads, **chosen, **engine.own) as pipeline:
            if pipeline.target.needs_device:
                pipeline.open(stage_key(0))
            yield pipeline
        return
    from ..export.proof.networks import graph_pipeline

    place = folder / "networks"
    place.mkdir()
    with progress(quiet) as bar:
        opened, (checkpoint, recipe) = open_bundle(bundle, **chosen), networks
        pipeline = graph_pipeline(opened, checkpoint, place, engine, recipe, Bars(bar))
    with pipeline:
        yield pipeline


def _ranges(pipeline: Pipeline) -> dict[str, Any] | None:
    from ..export.proof.ranges import range_errors

    return range_errors(pipeline.bundle)


def _compare(
    pipeline: Pipeline, trace: Trace, ranges: dict[str, Any] | None, watch: Watch, quiet: bool
) -> dict[str, Any]:
    steps = sum(run.steps for run in trace.runs)
    texts = len({run.prompt for run in trace.runs} | {trace.negative_prompt, *trace.texts})
    totals = {"text": texts, "stages": len(trace.probes), "chain": 2 * steps}
    totals |= dict.fromkeys(pipeline.bundle.manifest.decoders, 1) | {"video": len(trace.runs)}
    with progress(quiet) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        return check_parity(
            pipeline, trace, ranges=ranges, advance=lambda level: bar.advance(tasks[level]), watch=watch
        )


def _checkpoint(reference: Path, bundle: Path, asked: Recording) -> Checkpoint:
    """The reference at the bundle's resolution."""
    manifest = open_bundle(bundle, resolution=asked.resolution).manifest
    found = resolve_checkpoint(reference, manifest.resolution, asked.weights)
    require_same_loras(bundle, manifest.provenance, found)
    return found


def _diverges(levels: dict[str, Any]) -> bool:
    """Whether there is a layer to be named."""
    return not all(levels[name]["passed"] for name in ("ranges", "stages") if name in levels)


def _bisect(
    pipeline: Pipeline, reference: Path, asked: Recording, trace: Trace, levels: dict[str, Any]
) -> dict[str, Any] | None:
    """The layer whose range is wrong, or the one whose output diverges in the worst stage; None where none does."""
    if not _diverges(levels):
        return None
    from ..export.proof.bisect import first_divergence

    checkpoint = _checkpoint(reference, pipeline.bundle.folder, asked)
    if "ranges" in levels and not levels["ranges"]["passed"]:
        return first_divergence(pipeline, checkpoint, trace, **levels["ranges"]["worst"])
    return first_divergence(pipeline, checkpoint, trace, levels["stages"]["worst_stage"])


def _store(bundle: Bundle, result: dict[str, Any], field: str) -> None:
    """Sign the manifest again, with the result in it."""
    levels = {
        name: {key: value for key, value in level.items() if isinstance(value, int | float | bool)}
        for name, level in result["levels"].items()
    }
    path = bundle.folder / MANIFEST_FILE
    document = read_json(path)
    document[field][str(bundle.manifest.resolution)] = {"passed": result["passed"], "levels": levels}
    write_whole(path, json.dumps(signed(document), indent=1, ensure_ascii=False).encode())


def _show_recorded(path: Path, as_json: bool) -> None:
    if as_json:
        print_json({"trace": str(path), "bytes": path.stat().st_size})
    else:
        click.echo(f"{path}: {path.stat().st_size:,} bytes")


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        _show(result)


def _require_passed(result: dict[str, Any]) -> None:
    if not result["passed"]:
        raise CheckFailed(f"parity failed: {parity_verdict(result)} for {result['precision']}")


def _show(result: dict[str, Any]) -> None:
    print_table(f"parity at {result['resolution']}, {result['precision']}", LEVEL_COLUMNS, level_rows(result))
    growth = result["levels"]["chain"]["growth"]
    if growth:
        click.echo("free-running error after each step: " + " ".join(f"{value:.1e}" for value in growth[0]))
    if result.get("bisect", ...) is None:
        click.echo("nothing diverges: there is no layer to name")
    elif "bisect" in result:
        found = result["bisect"]
        places = [place for place in (found["first"], found["layer"]) if place]
        click.echo(f"stage {found['stage']}: first divergence at {', '.join(places) or 'no block of this probe'}")
