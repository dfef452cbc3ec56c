"""`pyrexport bench`: what a bundle costs here."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.engines import EngineOptions, Target, find_target
from ..runtime.bundle.manifest import Manifest
from ..runtime.bundle.opening import open_bundle
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.machine import usable_cores
from ..runtime.proof.measure import measure_bundle
from .common import PATH, engine_options, output_options, print_json, print_table, progress, require_bundle
from .hub import find_model
from .reading import resolution_option, resolve_checkpoint


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--schedule", help="Of the chain.")
@resolution_option
@click.option("--reference", type=PATH, help="Time this checkpoint in PyTorch too, alternating.")
@engine_options
@output_options
def command(
    bundle: Path,
    runs: int,
    schedule: str | None,
    resolution: Resolution | None,
    reference: Path | None,
    engine: EngineOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure latency per stage, load time, peak memory and glue of BUNDLE."""
    bundle = find_model(bundle, quiet=quiet)
    require_bundle(bundle)
    reference = None if reference is None else find_model(reference, quiet=quiet)
    threads = engine.threads or usable_cores()
    manifest = open_bundle(bundle, resolution=resolution).manifest
    target = find_target(manifest.target)
    if not target.needs_device:
        engine = replace(engine, threads=threads)
    child = None if reference is None else _reference_process(bundle, manifest, reference, schedule, threads)
    try:
        with progress(quiet) as bar:
            task = bar.add_task("runs", total=runs)
            document = measure_bundle(
                bundle,
                resolution=resolution,
                runs=runs,
                engine=engine,
                schedule=schedule,
                between=child.run if child else lambda: None,
                advance=lambda: bar.advance(task),
            )
        document |= _described(manifest, target, engine)
        if child is not None:
            document["reference"] = child.summary()
            document["ratio"] = document["chain"]["median"] / document["reference"]["chain"]["median"]
    finally:
        if child is not None:
            child.close()
    if as_json:
        print_json(document)
    else:
        _show(document, target)


def _described(manifest: Manifest, target: Target, engine: EngineOptions) -> dict[str, Any]:
    """Where measurements were taken, and what the target knows of the graphs."""
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "threads": engine.threads}
    facts = {graph.spec.name: dict(graph.facts) for graph in manifest.graphs.values() if graph.facts}
    return {"machine": {**machine, **engine.own}, "remark": target.remark(), "facts": facts}


def _reference_process(
    bundle: Path, manifest: Manifest, reference: Path, schedule: str | None, threads: int
) -> "ReferenceProcess":
    """A checkpoint in PyTorch, once it is known to be the bundle's model and to have the schedule.

    Raises:
        UsageError: it is another model, or there is no such schedule.
    """
    manifest.model.schedule(schedule)
    found = resolve_checkpoint(reference, manifest.resolution).model
    if found.to_json() != manifest.model.to_json():
        raise UsageError(f"{reference} is another model than {bundle}: a ratio would compare nothing")
    return ReferenceProcess(reference, schedule, threads, str(manifest.resolution))


class ReferenceProcess:
    """The PyTorch reference in a process of its own, so that neither side's memory or threads touch the other's."""

    def __init__(self, checkpoint: Path, schedule: str | None, threads: int, resolution: str) -> None:
        module = "pyrexport.export.reference.bench"
        command = [sys.executable, "-m", module, str(checkpoint), str(threads), schedule or "", resolution]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[dict[str, Any]] = []
        try:
            self._answer()  # the warm-up run
        except CheckFailed:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CheckFailed("the PyTorch reference stopped before it answered; sample the checkpoint to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> None:
        """One chain, timed in the other process."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self.times.append(self._answer())

    def summary(self) -> dict[str, Any]:
        """Minimum and median of its chains."""
        chains = [answer["chain"] for answer in self.times]
        return {
            "chain": {"min": min(chains), "median": statistics.median(chains)},
            "peak_rss_bytes": self.times[-1]["peak_rss_bytes"],
        }

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _show(document: dict[str, Any], target: Target) -> None:
    machine = document["machine"]
    click.echo(
        f"{machine['platform']}, {machine['cores']} cores, {machine['threads']} threads, {time.strftime('%Y-%m-%d')}"
    )
    if document["remark"]:
        click.echo(document["remark"])
    rows = [
        [
            name,
            f"{graph['calls']}",
            f"{1000 * graph['min']:.2f}",
            f"{1000 * graph['median']:.2f}",
            f"{1000 * graph['load']:.1f}",
        ]
        for name, graph in document["graphs"].items()
    ]
    print_table("graphs", ["graph", "calls a run", "min ms", "median ms", "load ms"], rows)
    table = target.table(document["facts"])
    if table is not None:
        print_table(**asdict(table))
    chain = document["chain"]
    click.echo(
        f"chain {document['schedule']}: min {1000 * chain['min']:.1f} ms, median {1000 * chain['median']:.1f} ms, "
        f"glue {100 * document['glue_share']:.2f} %; "
        f"peak anonymous memory {document['peak_anonymous_bytes'] / 2**20:.0f} MiB, "
        f"peak resident {document['peak_rss_bytes'] / 2**20:.0f} MiB"
    )
    if "reference" in document:
        theirs = document["reference"]["chain"]
        click.echo(
            f"PyTorch eager: min {1000 * theirs['min']:.1f} ms, median {1000 * theirs['median']:.1f} ms; "
            f"ratio {document['ratio']:.3f}"
        )
