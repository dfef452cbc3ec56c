"""From a checkpoint to a bundle: graphs, one weights file, a manifest; written beside and renamed into place."""

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.bundle import file_digest
from ..runtime.checkpoint import Checkpoint, read_checkpoint
from ..runtime.engines import Target, find_target
from ..runtime.errors import CheckFailed, UsageError
from ..runtime.manifest import (
    CACHE_PRECISIONS,
    MANIFEST_FILE,
    PRECISIONS,
    TEXT_PRECISIONS,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from ..runtime.pyramid import Resolution
from ..runtime.safetensors_header import read_header
from ..runtime.text import Tokenizer
from ..runtime.tiles import parse_tile
from ..targets.forms import OnnxForm, TensorSpec
from .describe import describe_bundle
from .layers import sources_of
from .memory import peak_bytes
from .modules import check_parts
from .names import to_diffusers
from .onnx_graph import export_onnx
from .output import STATE_FILE, check_output, locked, partial_of, swap, sync_file, write_synced
from .parts import (
    Options,
    Part,
    choose_tile,
    graph_parts,
    table_source,
)
from .text_graph import check_supported
from .weights import plan_weights, write_component

__all__ = ["Options", "Reporter", "build", "build_bundle", "make_options", "plan_memory"]


class Reporter:
    """Told what is being done; the command line shows it as progress bars."""

    def part(self, name: str, total: int) -> None:
        """A part of `total` units begins."""

    def advance(self, units: int) -> None:
        """Units of the current part are done."""

    def kept(self, name: str) -> None:
        """A part of an interrupted build is kept."""


def build_bundle(
    checkpoint: Checkpoint,
    target_name: str,
    target: Target,
    output: Path,
    *,
    options: Options | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Build a bundle.

    Parts are written to `OUTPUT.partial/`, and a rerun after an interruption keeps those that are finished and whose
    inputs are unchanged.

    Args:
        checkpoint: read and checked.
        target_name: of an installed target.
        target: found by that name.
        output: folder of the bundle.
        options: how weights are stored and frames are cut.
        force: replace a bundle that is there.
        reporter: told about progress.

    Raises:
        UsageError: the output is there, is no bundle, or another build is writing it.
        CheckFailed: the disk is too small; finished parts are kept.
    """
    check_parts(checkpoint)
    check_supported(checkpoint.text_encoder_config)
    check_output(output, force)
    partial = partial_of(output)
    with locked(partial):
        work = _Work(checkpoint, target_name, target, partial, options or Options(), reporter or Reporter())
        try:
            document = work.run()
            write_synced(partial / MANIFEST_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckFailed(
                f"{partial} cannot grow further ({error.strerror}): the weights alone take {work.plan.nbytes:,} bytes; make "
                "room and run again: finished parts are kept"
            ) from None
        swap(partial, output, force)
    return output


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "ort",
    precision: str = "fp32",
    text_precision: str | None = None,
    vae_tile: str = "auto",
    vae_caches: str = "fp32",
    resolution: str | None = None,
    force: bool = False,
) -> Path:
    """Build a bundle from a checkpoint folder; see `build_bundle`.

    Args:
        checkpoint: a folder.
        output: folder of the bundle.
        target: an installed target.
        precision: "fp32", "fp16" or "bf16".
        text_precision: of the text encoder, also "int8" or "int4"; None: the same.
        vae_tile: "auto", "none" or "HEIGHTxWIDTH" in latent pixels; see `choose_tile`.
        vae_caches: "fp32" or "fp16".
        resolution: "FRAMESxHEIGHTxWIDTH", in place of the checkpoint's own.
        force: replace a bundle that is there.

    Raises:
        UsageError: the checkpoint, the target or the output does not fit.
    """
    for wanted, known in (
        (precision, PRECISIONS),
        (text_precision or precision, TEXT_PRECISIONS),
        (vae_caches, CACHE_PRECISIONS),
    ):
        if wanted not in known:
            raise UsageError(f"unknown precision '{wanted}': expected one of {', '.join(known)}")
    size = None if resolution is None else Resolution.parse(resolution)
    opened = read_checkpoint(Path(checkpoint), resolution=size, rename=to_diffusers)
    options = make_options(opened, precision, text_precision, vae_tile, vae_caches)
    return build_bundle(opened, target, find_target(target), Path(output), options=options, force=force)


def make_options(
    checkpoint: Checkpoint, precision: str, text_precision: str | None, vae_tile: str, vae_caches: str
) -> Options:
    """Options as `build` takes them, the tile chosen where it is "auto".

    Raises:
        UsageError: the tile is malformed, too small, or larger than the frame; an option is for a part that is not there.
    """
    if text_precision is not None and not checkpoint.text_encoder:
        raise UsageError(f"{checkpoint.folder} has no text encoder: a precision of it says nothing")
    if not checkpoint.vae and (vae_tile not in ("auto", "none") or vae_caches != "fp32"):
        raise UsageError(f"{checkpoint.folder} has no VAE: a tile or caches of it say nothing")
    tile = None
    if checkpoint.vae:
        height, width = checkpoint.model.pyramid.stages[0].latent[2:]
        if vae_tile == "auto":
            tile = choose_tile(checkpoint, CACHE_PRECISIONS[vae_caches])
        elif vae_tile != "none":
            tile = parse_tile(vae_tile)
            if tile[0] > height or tile[1] > width:
                raise UsageError(f"a tile of {vae_tile} latent pixels is larger than the frame's {height}x{width}")
    return Options(precision, text_precision or precision, tile, CACHE_PRECISIONS[vae_caches])


def plan_memory(
    checkpoint: Checkpoint, *, options: Options | None = None, reporter: Reporter | None = None
) -> dict[str, int]:
    """What a run of each graph of a bundle would take in memory, in bytes, without weights; writes nothing.

    Args:
        checkpoint: read and checked.
        options: see `build_bundle`.
        reporter: told about progress.
    """
    check_parts(checkpoint)
    check_supported(checkpoint.text_encoder_config)
    reporter = reporter or Reporter()
    found = {}
    for part in graph_parts(checkpoint, options or Options()):
        reporter.part(f"graph {part.name}", 1)
        found[part.name] = peak_bytes(export_onnx(part.module, part.inputs, part.outputs, part.name).model)
        reporter.advance(1)
    return found


class _Work:
    """One build: its plan, and the state of its parts on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target_name: str,
        target: Target,
        partial: Path,
        options: Options,
        reporter: Reporter,
    ) -> None:
        self.checkpoint, self.target_name, self.target = checkpoint, target_name, target
        self.partial, self.options, self.reporter = partial, options, reporter
        self.parts = list(graph_parts(checkpoint, options))
        self.table = table_source(checkpoint, options.text_storage)
        sources = [source for part in self.parts for source in sources_of(part.module).values()]
        self.plan = plan_weights([*sources, *([self.table] if self.table else [])])
        self.state = self._read_state()
        self.identities = {
            component: _fingerprint(_identities(checkpoint, component)) for component in checkpoint.components
        }
        self.tokenizer = b""
        if checkpoint.text_encoder:
            self.tokenizer = (checkpoint.folder / "tokenizer" / "tokenizer.json").read_bytes()
        _check_headers(checkpoint)

    def run(self) -> dict[str, Any]:
        """Make what is missing, and describe all of it."""
        wanted = {
            MANIFEST_FILE,
            STATE_FILE,
            WEIGHTS_FILE,
            TOKENIZER_FILE,
            *(f"{part.name}.onnx" for part in self.parts),
        }
        for stale in self.partial.iterdir():
            if stale.name not in wanted:
                stale.unlink() if stale.is_file() or stale.is_symlink() else shutil.rmtree(stale)
        if self.checkpoint.text_encoder:
            write_synced(self.partial / TOKENIZER_FILE, self.tokenizer)
            Tokenizer(self.partial / TOKENIZER_FILE, self.checkpoint.model.text_length)
        self._weights()
        graphs = {part.name: self._graph(part) for part in self.parts}
        return self._describe(graphs)

    def _weights(self) -> None:
        file = self.partial / WEIGHTS_FILE
        held = file.stat().st_blocks * 512 if file.is_file() else 0
        free = shutil.disk_usage(self.partial).free
        if free + held < self.plan.nbytes:
            raise CheckFailed(
                f"{self.partial}: expected room for {self.plan.nbytes:,} bytes of weights, found {free + held:,} bytes free"
            )
        layout = _fingerprint([f"{source} {place}" for source, place in self.plan.places.items()])
        if not file.is_file() or self.state.get("layout") != layout or file.stat().st_size != self.plan.nbytes:
            self.state = {"layout": layout}
            self._write_state()
            with file.open("wb") as out:
                out.truncate(self.plan.nbytes)
        for component in dict.fromkeys(source.component for source in self.plan.places):
            key = f"weights of {component}"
            inputs, before = self.identities[component], self.state.get(key, {})
            if before.get("inputs") == inputs and before.get("sha256") == self._region(component):
                self.reporter.kept(key)
                continue
            self._require_unchanged(component)
            total = sum(place.nbytes for place in self.plan.component(component).values())
            self.reporter.part(key, total)
            write_component(self.checkpoint, self.plan, component, file, self.reporter.advance)
            self._finish(key, {"inputs": inputs, "sha256": self._region(component)})

    def _require_unchanged(self, component: str) -> None:
        if _fingerprint(_identities(self.checkpoint, component)) != self.identities[component]:
            raise UsageError(f"{self.checkpoint.folder / component} was changed during the build: run it again")

    def _region(self, component: str) -> str:
        """SHA-256 of a component's part of the weights file."""
        places = self.plan.component(component).values()
        first, last = min(place.offset for place in places), max(place.offset + place.nbytes for place in places)
        return file_digest(self.partial / WEIGHTS_FILE, start=first, end=last)

    def _graph(self, part: Part) -> dict[str, Any]:
        key = f"graph {part.name}"
        inputs = _fingerprint(
            [
                version("pyrexport"), version("torch"), version("onnxscript"), self.target_name, repr(self.options),
                self.state["layout"], json.dumps(self.checkpoint.model.to_json()), repr(self.checkpoint.config),
                json.dumps(self.checkpoint.text_encoder_config, sort_keys=True, default=str),
                json.dumps(self.checkpoint.vae_config, sort_keys=True, default=str),
            ]
        )  # fmt: skip
        entry: dict[str, Any] = self.state.get(key, {})
        if entry.get("inputs") == inputs and _is_whole(self.partial / entry["graph"]["file"], entry["sha256"]):
            self.reporter.kept(key)
            graph: dict[str, Any] = entry["graph"]
            return graph
        self.reporter.part(key, 1)
        exported = export_onnx(part.module, part.inputs, part.outputs, part.name)
        placements = {name: self.plan.places[source] for name, source in exported.sources.items()}
        specs = {
            "inputs": part.inputs,
            "outputs": tuple(_spec(value) for value in exported.model.graph.outputs),
        }
        file = self.target.build_graph(OnnxForm(part.name, exported.model, placements, **specs), self.partial)
        sync_file(self.partial / file)
        graph = {"file": file, "memory": peak_bytes(exported.model)} | {
            kind: {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype} for spec in values}
            for kind, values in specs.items()
        }
        self.reporter.advance(1)
        self._finish(key, {"inputs": inputs, "graph": graph, "sha256": file_digest(self.partial / file)})
        return graph

    def _describe(self, graphs: Mapping[str, Any]) -> dict[str, Any]:
        for component in self.checkpoint.components:
            self._require_unchanged(component)
        names = [*dict.fromkeys(graph["file"] for graph in graphs.values()), WEIGHTS_FILE]
        names += [TOKENIZER_FILE] if self.checkpoint.text_encoder else []
        files = {}
        for name in names:
            path = self.partial / name
            self.reporter.part(f"hash of {name}", path.stat().st_size)
            files[name] = {"sha256": file_digest(path, self.reporter.advance), "bytes": path.stat().st_size}
        engine = {"name": self.target.ENGINE, "version": self.target.engine_version()}
        table = None if self.table is None else self.plan.places[self.table]
        return describe_bundle(
            self.checkpoint, self.options, self.target_name, engine,
            graphs=graphs, table=table, weight_bytes=self.plan.weight_bytes, files=files,
        )  # fmt: skip

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.partial / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(state, dict):
            return {}
        fields: dict[str, set[str]] = {"weights": {"inputs", "sha256"}, "graph": {"inputs", "sha256", "graph"}}
        return {
            key: value for key, value in state.items()
            if key == "layout" or (isinstance(value, dict) and value.keys() == fields.get(key.partition(" ")[0]))
        }  # fmt: skip

    def _write_state(self) -> None:
        write_synced(self.partial / STATE_FILE, json.dumps(self.state).encode())

    def _finish(self, key: str, value: Any) -> None:
        self.state[key] = value
        self._write_state()


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    return TensorSpec(value.name, tuple(int(n) for n in value.shape.numpy()), str(value.dtype.numpy()))


def _identities(checkpoint: Checkpoint, component: str) -> list[str]:
    """What tells one version of a component's files from another without reading them."""
    files = sorted({entry.file for entry in checkpoint.components[component].values()})
    lines = []
    for file in files:
        status = file.stat()
        lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    return lines


def _check_headers(checkpoint: Checkpoint) -> None:
    """Refuse files that were replaced since their headers were read: what is read next would be elsewhere in them."""
    entries = [entry for tensors in checkpoint.components.values() for entry in tensors.values()]
    headers = {file: read_header(file) for file in dict.fromkeys(entry.file for entry in entries)}
    for entry in entries:
        if headers[entry.file].get(entry.name) != entry:
            raise UsageError(f"{entry.file} was changed since it was opened: run the build again")


def _fingerprint(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_whole(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256
