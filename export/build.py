"""From a checkpoint to a bundle: graphs, one weights file, a manifest; written beside and renamed into place."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.bundle import file_digest, is_bundle
from ..runtime.checkpoint import Checkpoint, read_checkpoint
from ..runtime.engines import Target, find_target
from ..runtime.errors import UsageError
from ..runtime.manifest import (
    FORMAT,
    MANIFEST_FILE,
    PRECISIONS,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    cache_names,
    signed,
)
from ..runtime.pyramid import Resolution
from ..targets.forms import OnnxForm, TensorSpec
from .layers import Source, WeightSpace, sources_of
from .modules import check_parts, empty_modules
from .names import to_diffusers
from .onnx_graph import export_onnx
from .stage_graph import StageGraph
from .text_graph import TextGraph, check_supported
from .vae_graph import VaeGraph
from .weights import plan_weights, write_component

__all__ = ["TEXT_LENGTHS", "Reporter", "build", "build_bundle", "check_output"]

TEXT_LENGTHS = (64, 128, 256)
"""Static lengths of the text encoder below the model's own; a prompt takes the shortest that holds it."""

STATE_FILE = "parts.json"


class Reporter:
    """Told what is being done; the command line shows it as progress bars."""

    def part(self, name: str, total: int) -> None:
        """A part of `total` units begins."""

    def advance(self, units: int) -> None:
        """Units of the current part are done."""

    def kept(self, name: str) -> None:
        """A part of an interrupted build is kept."""


@dataclass(frozen=True)
class Part:
    """A graph to be made."""

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]


def build_bundle(
    checkpoint: Checkpoint,
    target_name: str,
    target: Target,
    output: Path,
    *,
    precision: str = "fp32",
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
        precision: "fp32", "fp16" or "bf16": how matrices are stored.
        force: replace a bundle that is there.
        reporter: told about progress.

    Raises:
        UsageError: the output is there, is no bundle, or another build is writing it.
    """
    check_parts(checkpoint)
    check_supported(checkpoint.text_encoder_config)
    check_output(output, force)
    partial = output.with_name(output.name + ".partial")
    with _locked(partial):
        work = _Work(checkpoint, target_name, target, partial, precision, reporter or Reporter())
        document = work.run()
        _write_synced(partial / MANIFEST_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode())
        (partial / STATE_FILE).unlink(missing_ok=True)
        _sync_folder(partial)
        _swap(partial, output)
    return output


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "ort",
    precision: str = "fp32",
    resolution: str | None = None,
    force: bool = False,
) -> Path:
    """Build a bundle from a checkpoint folder; see `build_bundle`.

    Args:
        checkpoint: a folder.
        output: folder of the bundle.
        target: an installed target.
        precision: "fp32", "fp16" or "bf16".
        resolution: "FRAMESxHEIGHTxWIDTH", in place of the checkpoint's own.
        force: replace a bundle that is there.

    Raises:
        UsageError: the checkpoint, the target or the output does not fit.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}': expected one of {', '.join(PRECISIONS)}")
    size = None if resolution is None else Resolution.parse(resolution)
    opened = read_checkpoint(Path(checkpoint), resolution=size, rename=to_diffusers)
    return build_bundle(opened, target, find_target(target), Path(output), precision=precision, force=force)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that is in the way, before any work; put back a bundle whose replacement was interrupted.

    Raises:
        UsageError: the output exists, and is not a bundle that may be replaced.
    """
    old = _replaced(output)
    if old.exists() and not os.path.lexists(output):
        old.rename(output)  # an earlier replacement was interrupted between its two renames
    if not output.absolute().parent.is_dir():
        raise UsageError(f"folder {output.absolute().parent} of the output does not exist; make it first")
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"{output} exists: give --force to replace it")
    if not is_bundle(output):
        raise UsageError(f"{output} exists and is not a bundle: only a bundle is replaced; remove it yourself")


def _replaced(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")


def _swap(partial: Path, output: Path) -> None:
    old = _replaced(output)
    if os.path.lexists(output):
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    partial.rename(output)
    _sync_folder(output.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another build is writing {partial}: wait for it") from None
        yield
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, data: bytes) -> None:
    """Write a file beside and rename it into place, so that a part is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class _Work:
    """One build: its plan, and the state of its parts on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target_name: str,
        target: Target,
        partial: Path,
        precision: str,
        reporter: Reporter,
    ) -> None:
        self.checkpoint, self.target_name, self.target = checkpoint, target_name, target
        self.partial, self.precision, self.reporter = partial, precision, reporter
        self.storage = PRECISIONS[precision]
        self.parts = list(_graph_parts(checkpoint, self.storage))
        self.table = _table_source(checkpoint, self.storage)
        sources = [source for part in self.parts for source in sources_of(part.module).values()]
        self.plan = plan_weights([*sources, *([self.table] if self.table else [])])
        self.state = self._read_state()

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
        self._weights()
        graphs = {part.name: self._graph(part) for part in self.parts}
        if self.checkpoint.text_encoder:
            tokenizer = (self.checkpoint.folder / "tokenizer" / "tokenizer.json").read_bytes()
            _write_synced(self.partial / TOKENIZER_FILE, tokenizer)
        return self._describe(graphs)

    def _weights(self) -> None:
        file = self.partial / WEIGHTS_FILE
        layout = _fingerprint([f"{source} {place}" for source, place in self.plan.places.items()])
        if not file.is_file() or self.state.get("layout") != layout or file.stat().st_size != self.plan.nbytes:
            self.state = {"layout": layout}
            self._write_state()
            with file.open("wb") as out:
                out.truncate(self.plan.nbytes)
        for component in dict.fromkeys(source.component for source in self.plan.places):
            key = f"weights of {component}"
            inputs = _fingerprint(_identities(self.checkpoint, component))
            if self.state.get(key) == inputs:
                self.reporter.kept(key)
                continue
            total = sum(place.nbytes for place in self.plan.component(component).values())
            self.reporter.part(key, total)
            write_component(self.checkpoint, self.plan, component, file, self.reporter.advance)
            self.state.pop("sha256 of weights", None)
            self._finish(key, inputs)

    def _graph(self, part: Part) -> dict[str, Any]:
        key = f"graph {part.name}"
        inputs = _fingerprint(
            [
                version("pyrexport"), version("torch"), version("onnxscript"), self.target_name, self.precision,
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
            "inputs": tuple(TensorSpec(name, shape) for name, shape in part.inputs.items()),
            "outputs": tuple(
                TensorSpec(value.name or "", tuple(value.shape.numpy() if value.shape else ()))
                for value in exported.model.graph.outputs
            ),
        }
        file = self.target.build_graph(OnnxForm(part.name, exported.model, placements, **specs), self.partial)
        graph = {"file": file} | {
            kind: {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype} for spec in values}
            for kind, values in specs.items()
        }
        self.reporter.advance(1)
        self._finish(key, {"inputs": inputs, "graph": graph, "sha256": file_digest(self.partial / file)})
        return graph

    def _describe(self, graphs: Mapping[str, Any]) -> dict[str, Any]:
        model, config = self.checkpoint.model, self.checkpoint.config
        names = [*dict.fromkeys(graph["file"] for graph in graphs.values()), WEIGHTS_FILE]
        names += [TOKENIZER_FILE] if self.checkpoint.text_encoder else []
        files = {}
        for name in names:
            path = self.partial / name
            self.reporter.part(f"hash of {name}", path.stat().st_size)
            files[name] = {"sha256": file_digest(path, self.reporter.advance), "bytes": path.stat().st_size}
        mean, std = latent_statistics(self.checkpoint)
        return signed(
            {
                "format": FORMAT,
                "target": self.target_name,
                "engine": {"name": self.target.ENGINE, "version": self.target.engine_version()},
                "model": model.to_json(),
                "transformer": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(config).items()},
                "precision": {"storage": self.precision, "compute": "fp32"},
                "timestep_frequencies": timestep_frequencies(config.freq_dim),
                "latents": {"mean": mean, "std": std},
                "text": self._describe_text(),
                "graphs": dict(graphs),
                "weights": {"bytes": self.plan.weight_bytes},
                "files": files,
                "provenance": _provenance(self.checkpoint, self.precision),
                "parity": None,
            }
        )

    def _describe_text(self) -> dict[str, Any] | None:
        if self.table is None:
            return None
        place = self.plan.places[self.table]
        table = {"offset": place.offset, "rows": place.shape[0], "width": place.shape[1], "dtype": place.dtype}
        return {"lengths": _text_lengths(self.checkpoint), "table": table}

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.partial / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self) -> None:
        _write_synced(self.partial / STATE_FILE, json.dumps(self.state).encode())

    def _finish(self, key: str, value: Any) -> None:
        self.state[key] = value
        self._write_state()


def _graph_parts(checkpoint: Checkpoint, storage: str) -> Iterator[Part]:
    model, config = checkpoint.model, checkpoint.config
    for stage in model.pyramid.stages:
        inputs = {
            "latent": (1, *stage.latent),
            "timestep_features": (1, config.freq_dim),
            "text": (1, model.text_length, config.text_dim),
        }
        yield Part(f"stage{stage.index}", StageGraph(checkpoint, stage, storage), inputs, ("velocity",))
    if checkpoint.text_encoder:
        for length in _text_lengths(checkpoint):
            inputs = {"embeddings": (1, length, config.text_dim), "mask": (1, length)}
            yield Part(f"text_{length}", TextGraph(checkpoint, length, storage), inputs, ("text",))
    if checkpoint.vae:
        yield from _vae_parts(checkpoint, storage)


def _vae_parts(checkpoint: Checkpoint, storage: str) -> Iterator[Part]:
    channels, _, height, width = checkpoint.model.pyramid.stages[0].latent
    latent = {"latent": (1, channels, height, width)}
    first = VaeGraph(checkpoint, storage, first=True)
    shapes = first.cache_shapes(height, width)
    outputs = ("frames", *cache_names(len(shapes), new=True))
    yield Part("vae_first", first, latent, outputs)
    caches = dict(zip(cache_names(len(shapes)), shapes, strict=True))
    yield Part("vae_next", VaeGraph(checkpoint, storage, first=False), latent | caches, outputs)


def _text_lengths(checkpoint: Checkpoint) -> list[int]:
    longest = checkpoint.model.text_length
    return [length for length in TEXT_LENGTHS if length < longest] + [longest]


def _table_source(checkpoint: Checkpoint, storage: str) -> Source | None:
    if not checkpoint.text_encoder:
        return None
    space = WeightSpace("text_encoder", checkpoint.text_encoder, storage)
    source: Source = space.kernel("shared.weight").source  # type: ignore[attr-defined]
    return source


def timestep_frequencies(width: int) -> list[float]:
    """Frequencies of the timestep features, by diffusers' formula in PyTorch's float32."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(0, half, dtype=torch.float32) / half
    return [float(value) for value in torch.exp(exponent)]


def latent_statistics(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents per channel, from the VAE's configuration or diffusers' defaults."""
    channels = checkpoint.config.in_channels
    if checkpoint.vae_config is None:
        return [0.0] * channels, [1.0] * channels
    config = empty_modules(checkpoint)["vae"].config
    return [float(v) for v in config.latents_mean], [float(v) for v in config.latents_std]  # type: ignore[union-attr]


def _identities(checkpoint: Checkpoint, component: str) -> list[str]:
    """What tells one version of a component's files from another without reading them."""
    files = sorted({entry.file for entry in checkpoint.components[component].values()})
    lines = []
    for file in files:
        status = file.stat()
        lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return lines


def _provenance(checkpoint: Checkpoint, precision: str) -> dict[str, Any]:
    files: dict[str, str] = {}
    for component in checkpoint.components:
        for file in sorted({entry.file for entry in checkpoint.components[component].values()}):
            files[f"{component}/{file.name}"] = file_digest(file)
    packages = ("pyrexport", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
    return {
        "checkpoint": {"sha256": _fingerprint(f"{name} {sha}" for name, sha in files.items()), "files": files},
        "packages": {name: version(name) for name in packages},
        "options": {"precision": precision},
    }


def _fingerprint(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_whole(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256
