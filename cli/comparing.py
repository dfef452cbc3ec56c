"""What `quality` compares: runs of a reference and of a bundle, here or on a cluster's workers."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.graphs import stage_key
from ..runtime.files import file_digest
from ..runtime.model.identity import checkpoint_digest, checkpoint_files
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.proof.quality import QualityLimits, check_quality, check_traces, compare_run, judge_runs
from ..runtime.proof.trace import Run, Trace
from .cluster import Cluster, Spread, in_order, require_same
from .common import progress
from .reading import resolve_checkpoint
from .recording import Recording
from .reports import FramePairs, Kept

__all__ = ["Comparison", "compare_elsewhere", "compare_here"]

Outcome = tuple[dict[str, Any], tuple[Run, ...]]
"""What `check_quality` says, and of which runs."""


@dataclass(frozen=True)
class Comparison:
    """The two sides, as another process is told of them too."""

    bundle: Path
    reference: Path | None
    """A checkpoint, whose runs are to be recorded; None: they are in traces."""
    traces: tuple[Path, ...]
    asked: Recording
    engine: EngineOptions

    def on(self, cluster: Cluster) -> "Comparison":
        """The same, as workers find it, which start in other folders."""
        if cluster.address is None:
            return self
        reference = self.reference and self.reference.absolute()
        traces = tuple(trace.absolute() for trace in self.traces)
        asked = self.asked if reference is None else self.asked.elsewhere()
        return replace(self, bundle=self.bundle.absolute(), reference=reference, traces=traces, asked=asked)

    @property
    def count(self) -> int:
        """How many runs are compared."""
        if self.reference is None:
            return sum(len(trace.runs) for trace in self.opened())
        return len(self.asked.words) * len(self.asked.seeds)

    def open(self) -> Pipeline:
        """The bundle, with a device that answers where it needs one."""
        how = {"resolution": self.asked.size_for(self.traces), "decoder": self.asked.decoder, **self.engine.own}
        pipeline = load(self.bundle, threads=self.engine.threads, **how)
        if pipeline.target.needs_device:
            pipeline.open(stage_key(0))
        return pipeline

    def opened(self) -> list[Trace]:
        """The traces, where the runs are in some."""
        return [Trace(path) for path in self.traces]

    def record(self, folder: str, quiet: bool, only: Sequence[int] | None = None) -> Trace:
        """Runs of the checkpoint, all or some, recorded into a folder."""
        assert self.reference is not None
        file = Path(folder) / "trace.safetensors"
        self.asked.write(self.reference, file, self.bundle, quiet, only=only, parts=False)
        return Trace(file)

    def facts(self, pipeline: Pipeline) -> dict[str, str]:
        """What all machines must see under the same paths: hashes by path."""
        manifest = pipeline.bundle.manifest
        found = {str(self.bundle): manifest.digest} | {str(trace): file_digest(trace) for trace in self.traces}
        if self.reference is not None:
            checkpoint = resolve_checkpoint(self.reference, manifest.resolution, self.asked.weights)
            found[str(self.reference)] = checkpoint_digest(checkpoint_files(checkpoint))
        return found


def compare_here(
    pipeline: Pipeline, comparison: Comparison, limits: QualityLimits, pairs: FramePairs, quiet: bool
) -> Outcome:
    """All runs, one after another; those of a checkpoint are recorded first."""
    with tempfile.TemporaryDirectory() as folder:
        traces = comparison.opened() if comparison.reference is None else [comparison.record(folder, quiet)]
        runs = tuple(run for trace in traces for run in trace.runs)
        _, frames, *_ = pipeline.bundle.manifest.stages[0].latent
        totals = {"chain": sum(run.steps for run in runs), "video": sum(run.chunks for run in runs) * frames}
        with progress(quiet) as bar:
            tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
            result = check_quality(
                pipeline, traces, limits, advance=lambda level: bar.advance(tasks[level]), watch=pairs
            )
        return result, runs


def compare_elsewhere(
    pipeline: Pipeline, comparison: Comparison, limits: QualityLimits, pairs: FramePairs, quiet: bool, spread: Spread
) -> Outcome:
    """All runs, each by some worker, which records those of a checkpoint too; the outcome is the same."""
    threads = 0
    if comparison.reference is not None:
        import torch

        threads = torch.get_num_threads()
    work, found = partial(open_worker, comparison=comparison, facts=comparison.facts(pipeline), threads=threads), []
    numbers = range(comparison.count)
    with progress(quiet) as bar:
        task = bar.add_task("runs", total=len(numbers))
        for compared in in_order(spread(work, numbers)):
            bar.advance(task)
            found.append(compared)
            pairs.kept |= compared.frames
    figures = [compared.figures for compared in found]
    return judge_runs(pipeline.bundle.manifest, figures, limits), tuple(compared.run for compared in found)


@dataclass(frozen=True)
class _Compared:
    """What a worker says of a run."""

    run: Run
    figures: dict[str, Any]
    """See `compare_run`."""
    frames: Kept


def open_worker(
    stack: ExitStack, *, comparison: Comparison, facts: Mapping[str, str], threads: int
) -> Callable[[int], _Compared]:
    """What compares runs, by their numbers, in another process: see `cluster.Open`.

    PyTorch, where it records a run, takes so many threads.

    Raises:
        UsageError: the files there are others than here.
    """
    pipeline = stack.enter_context(comparison.open())
    require_same(comparison.facts(pipeline), facts)
    if comparison.reference is None:
        places = [(trace, index) for trace in comparison.opened() for index in range(len(trace.runs))]
        return lambda number: _compare(pipeline, *places[number], number)
    import torch

    torch.set_num_threads(threads)  # Ray tells libraries to take one

    def record_and_compare(number: int) -> _Compared:
        with tempfile.TemporaryDirectory() as folder:
            return _compare(pipeline, comparison.record(folder, quiet=True, only=[number]), 0, number)

    return record_and_compare


def _compare(pipeline: Pipeline, trace: Trace, index: int, number: int) -> _Compared:
    check_traces(pipeline, [trace])
    pairs = FramePairs()
    figures = compare_run(pipeline, trace, index, lambda level: None, partial(pairs, number))
    return _Compared(trace.runs[index], figures, pairs.kept)
