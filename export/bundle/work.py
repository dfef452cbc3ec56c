"""The work of a build, piece by piece, in the folder beside its output: each piece is kept once it is finished."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.entries import GraphEntry
from ...runtime.bundle.graphs import GraphKey
from ...runtime.bundle.manifest import MANIFEST_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from ...runtime.errors import CheckFailed
from ...runtime.files import file_digest, is_left_behind, is_partial, sync_file, write_whole
from ...runtime.pipeline.text import Tokenizer
from ...runtime.reporter import Reporter
from ..lowering.forms import make_forms
from ..lowering.graphs import GraphModule
from ..weights.places import Places
from ..weights.stream import write_component
from .blueprint import LOWERING_FILE, Blueprint
from .journal import Journal, program_digest
from .output import STATE_FILE

__all__ = ["clean", "make_room", "try_graphs", "write_programs", "write_tokenizer", "write_weights"]


def clean(folder: Path, blueprint: Blueprint, journal: Journal) -> None:
    """Remove what an interrupted build of other options left."""
    files = {name for program in blueprint.programs for name in blueprint.files_of(program)}
    files |= {name for program in blueprint.programs for name in journal.files_of(program)}
    wanted = {MANIFEST_FILE, STATE_FILE, *blueprint.files, *files}
    wanted |= {TOKENIZER_FILE} if blueprint.checkpoint.text_encoder else set()
    for stale in folder.iterdir():
        if (stale.name not in wanted and not is_left_behind(stale.name)) or is_partial(stale.name):
            stale.unlink() if stale.is_file() or stale.is_symlink() else shutil.rmtree(stale)


def write_tokenizer(folder: Path, blueprint: Blueprint) -> None:
    """Copy the tokenizer, and see that it is one."""
    checkpoint = blueprint.checkpoint
    if checkpoint.text_encoder:
        write_whole(folder / TOKENIZER_FILE, checkpoint.tokenizer_file.read_bytes())
        Tokenizer(folder / TOKENIZER_FILE, checkpoint.model.text_length)


def make_room(folder: Path, blueprint: Blueprint, *, lowers: bool) -> None:
    """Make the weights files at their size; refuse a disk that is too small for them.

    Args:
        folder: the build's folder.
        blueprint: the bundle's blueprint.
        lowers: programs are still to be written; where they hold their weights, room is needed for these twice.

    Raises:
        CheckFailed: too little is free.
    """
    files = {name: places.nbytes for name, places in blueprint.files.items() if lowers or name == WEIGHTS_FILE}
    held = sum((folder / name).stat().st_blocks * 512 for name in files if (folder / name).is_file())
    needed = sum(files.values()) + files.get(LOWERING_FILE, 0)
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        raise CheckFailed(f"{folder}: expected room for {needed:,} bytes of weights, found {free + held:,} bytes free")
    for name, nbytes in files.items():
        file = folder / name
        if not (file.is_file() and file.stat().st_size == nbytes):
            with file.open("wb") as out:
                out.truncate(nbytes)


def write_weights(folder: Path, blueprint: Blueprint, journal: Journal, reporter: Reporter, *, lowers: bool) -> None:
    """Fill the weights files, component by component; those of programs that are all there are not needed again."""
    for name, places in blueprint.files.items():
        if not lowers and name == LOWERING_FILE:
            continue
        for component in places.components:
            table = name == WEIGHTS_FILE and blueprint.target.holds_weights
            key = f"weights of {component}{' table' if table else ''}"
            inputs, before = journal.identities.of[component], journal.get(key)
            if before.get("inputs") == inputs and before.get("sha256") == _region(folder / name, places, component):
                reporter.kept(key)
                continue
            journal.identities.require_unchanged(component)
            reporter.begin(key, sum(place.nbytes for place in places.component(component).values()))
            tensors = blueprint.tensors[component]
            write_component(tensors, places, component, folder / name, reporter.advance)
            journal.finish(key, {"inputs": inputs, "sha256": _region(folder / name, places, component)})


def _region(file: Path, places: Places, component: str) -> str:
    """SHA-256 of a component's part of a weights file."""
    lying = places.component(component).values()
    first, last = min(place.offset for place in lying), max(place.offset + place.nbytes for place in lying)
    return file_digest(file, start=first, end=last)


def write_programs(folder: Path, blueprint: Blueprint, journal: Journal, reporter: Reporter, kept: set[str]) -> None:
    """Write each program that is not kept; what is known of its graphs by then is in the journal."""
    for program, graphs in blueprint.programs.items():
        if program in kept:
            reporter.kept(f"graph {program}")
        else:
            reporter.begin(f"graph {program}", len(graphs))
            written = _write_program(folder, blueprint, program, graphs, reporter)
            sha256 = program_digest([folder / name for name in written["files"]])
            journal.finish(f"program {program}", {"inputs": journal.inputs, "sha256": sha256, **written})


def _write_program(
    folder: Path, blueprint: Blueprint, program: str, graphs: Sequence[GraphModule], reporter: Reporter
) -> dict[str, Any]:
    """Write a program; returns what is known of each graph, by its name, and the names of all files."""
    target, name = blueprint.target, blueprint.weights_of(program)
    forms = make_forms(target.form, program, graphs, blueprint.dialect, blueprint.files[name], folder / name)
    known, files = {}, dict.fromkeys(blueprint.files_of(program))
    lowered = target.write_program(program, forms, folder, blueprint.options.target)
    for graph, lowering in zip(graphs, lowered, strict=True):
        if lowering.line:
            reporter.said(lowering.line)
        known[graph.spec.name] = {"memory": lowering.memory, "facts": dict(lowering.facts)}
        files |= dict.fromkeys(lowering.files)
        reporter.advance(1)
    for written in files:
        sync_file(folder / written)
    return {"graphs": known, "files": list(files)}


def try_graphs(
    folder: Path, blueprint: Blueprint, journal: Journal, reporter: Reporter, *, run: bool
) -> dict[GraphKey, GraphEntry]:
    """Let the target run each graph that it has not yet run; returns the manifest's entries."""
    entries = {}
    for program, graphs in blueprint.programs.items():
        key, file = f"program {program}", blueprint.files_of(program)[0]
        written = journal.get(key)
        for graph in graphs:
            known = written["graphs"][graph.spec.name]
            if run and known["memory"] is None:
                reporter.begin(f"run of {graph.spec.name}", 1)
                known["memory"] = blueprint.target.try_graph(folder / file, graph.spec, known["facts"])
                reporter.advance(1)
                journal.finish(key, written)
            entries[graph.spec.key] = GraphEntry(graph.spec, file, known["memory"], known["facts"])
    return entries
