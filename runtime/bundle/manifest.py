"""The manifest of a bundle: what it holds, what it needs, and what proves that it is whole."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..chain.pyramid import Resolution, Stage
from ..documents import Fields
from ..errors import UsageError
from ..files import MANIFEST_FILE
from ..model.description import Model
from ..model.preview import PreviewMap
from ..quantisation import DECODERS, SCHEMES, Scheme
from .entries import (
    FileEntry,
    GraphEntry,
    TextEntry,
    read_frame_rate,
    read_frequencies,
    read_model,
    read_parity,
    read_ranges,
    read_schemes,
    read_statistics,
)
from .graphs import Decoder, GraphKey
from .sizes import Size, decoders_json, entries_of, read_sizes

__all__ = ["MANIFEST_FILE", "TOKENIZER_FILE", "WEIGHTS_FILE", "Manifest", "digest", "parse_manifest", "signed"]

FORMAT = 6
WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

FIELDS = (
    "format",
    "target",
    "target_options",
    "engine",
    "model",
    "transformer",
    "resolutions",
    "frame_rate",
    "precision",
    "quantised",
    "ranges",
    "timestep_frequencies",
    "latents",
    "preview",
    "text",
    "decoders",
    "graphs",
    "weights",
    "files",
    "provenance",
    "parity",
    "graph_parity",
    "hash",
)


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every field has been checked."""

    target: str
    target_options: Mapping[str, Any]
    """The target's own options that it was built with."""
    engine: str
    engine_version: str
    model: Model
    sizes: tuple[Size, ...]
    """What it holds for each resolution; the first is the default."""
    frame_rate: int
    """Frames a second of its videos."""
    precision: Mapping[str, str]
    """By component: the scheme of what is stored in floating-point numbers."""
    quantised: Mapping[str, str]
    """By component: the scheme of its blocks' matrices, where they are stored in integers."""
    ranges: Mapping[str, tuple[tuple[float, float], ...]]
    """By layer, as the checkpoint calls it, whose input is rounded by constants: the interval [low, high] that its
    integers are to hold in each stage, finest first."""
    compute: str
    """Scheme of the arithmetic of what is stored in floating-point numbers."""
    timestep_frequencies: tuple[float, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    preview: PreviewMap | None
    """What shows latents while they are made."""
    text: TextEntry | None
    files: Mapping[str, FileEntry]
    weight_bytes: int
    provenance: Mapping[str, Any]
    parity: Mapping[str, Any]
    """By resolution: what `parity` found, where it was kept."""
    graph_parity: Mapping[str, Any]
    """Parity of the networks that engines were built from, evaluated without their device."""
    chosen: int = 0
    """Index of the size that is sampled at: of no consequence to what is written."""
    decodes_with: str | None = None
    """Component that decodes, in place of the model's first decoder: likewise."""

    def scheme(self, component: str) -> Scheme:
        """What a component's matrices are stored in."""
        return SCHEMES[self.quantised.get(component, self.precision[component])]

    @property
    def digest(self) -> str:
        """One SHA-256 of all its files."""
        lines = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """What it can sample at; the first is the default."""
        return tuple(size.resolution for size in self.sizes)

    @property
    def resolution(self) -> Resolution:
        """What it samples at."""
        return self.sizes[self.chosen].resolution

    @property
    def decoders(self) -> Mapping[str, Decoder]:
        """How frames of its resolution can be decoded, by component."""
        return self.sizes[self.chosen].decoders

    @property
    def decoder(self) -> Decoder | None:
        """How frames of its resolution are decoded, where they are."""
        return self.decoders.get(self.decodes_with or next(iter(self.decoders), ""))

    @property
    def graphs(self) -> Mapping[GraphKey, GraphEntry]:
        """The graphs of its resolution."""
        return self.sizes[self.chosen].graphs

    @property
    def entries(self) -> Mapping[str, GraphEntry]:
        """The graphs of all resolutions, by their own names."""
        return entries_of(self.sizes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The model's stages at its resolution, finest first."""
        return self.model.stages(self.resolution)

    def at(self, resolution: Resolution | None) -> "Manifest":
        """The same manifest, sampling at another of its resolutions; None: the first.

        Raises:
            UsageError: it has no such resolution.
        """
        if resolution is not None and resolution not in self.resolutions:
            known = ", ".join(map(str, self.resolutions))
            raise UsageError(
                f"the bundle samples at {known}, found {resolution}: give one of these, or build with that too"
            )
        return replace(self, chosen=0 if resolution is None else self.resolutions.index(resolution))

    def decoding(self, name: str | None) -> "Manifest":
        """The same manifest, decoding with one of its decoders: a name of `DECODERS`; None: its first.

        Raises:
            UsageError: it has no such decoder.
        """
        known = [each for each, component in DECODERS.items() if component in self.decoders]
        if name is not None and name not in known:
            found = f"decodes by {' or '.join(known)}" if known else "has none"
            raise UsageError(f"the bundle {found}, found decoder '{name}': take another, or build with that too")
        return replace(self, decodes_with=None if name is None else DECODERS[name])

    def to_json(self) -> dict[str, Any]:
        """The signed document that `parse_manifest` reads."""
        return signed(
            {
                "format": FORMAT,
                "target": self.target,
                "target_options": dict(self.target_options),
                "engine": {"name": self.engine, "version": self.engine_version},
                "model": self.model.to_json(),
                "transformer": self.model.transformer.to_json(),
                "resolutions": [str(resolution) for resolution in self.resolutions],
                "frame_rate": self.frame_rate,
                "precision": {**self.precision, "compute": self.compute},
                "quantised": dict(self.quantised),
                "ranges": {name: [list(pair) for pair in pairs] for name, pairs in self.ranges.items()},
                "timestep_frequencies": list(self.timestep_frequencies),
                "latents": {"mean": list(self.latents_mean), "std": list(self.latents_std)},
                "preview": None if self.preview is None else self.preview.to_json(),
                "text": None if self.text is None else self.text.to_json(),
                "decoders": decoders_json(self.sizes, self.model),
                "graphs": {name: entry.to_json() for name, entry in self.entries.items()},
                "weights": {"bytes": self.weight_bytes},
                "files": {name: entry.to_json() for name, entry in self.files.items()},
                "provenance": dict(self.provenance),
                "parity": dict(self.parity),
                "graph_parity": dict(self.graph_parity),
            }
        )


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own hash left out."""
    content = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def signed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the hash of its content."""
    return {**document, "hash": digest(document)}


def parse_manifest(document: Any, source: str) -> Manifest:
    """Check a manifest.

    Raises:
        UsageError: a field is missing, unknown or impossible, or the content is not what its hash says.
    """
    fields = Fields(document, source)
    if fields.get("format", "a whole number", lambda v: type(v) is int) != FORMAT:
        raise fields.wrong("format", f"{FORMAT} (another format needs another version of pyrexport)")
    fields.only(FIELDS)
    if fields.text("hash") != digest(fields.document):
        raise UsageError(
            f"{source} was changed after the bundle was built: it is not what its hash says; fetch or build it again"
        )
    model, files = read_model(fields), _files(fields)
    engine = _only(fields.object("engine"), "name", "version")
    precision, quantised, compute = read_schemes(fields)
    text = _text(fields, model, files)
    mean, std = read_statistics(fields.object("latents"), model.pyramid.geometry.channels)
    return Manifest(
        target=fields.text("target"),
        target_options=fields.object("target_options").document,
        engine=engine.text("name"),
        engine_version=engine.text("version"),
        model=model,
        sizes=read_sizes(fields, model, text.lengths if text else (), files),
        frame_rate=read_frame_rate(fields),
        precision=precision,
        quantised=quantised,
        ranges=read_ranges(fields, quantised, model.pyramid.depth),
        compute=compute,
        timestep_frequencies=read_frequencies(fields, model.transformer),
        latents_mean=mean,
        latents_std=std,
        preview=_preview(fields, model),
        text=text,
        files=files,
        weight_bytes=fields.object("weights").integer("bytes", least=0),
        provenance=fields.object("provenance").document,
        parity=read_parity(fields, "parity"),
        graph_parity=read_parity(fields, "graph_parity"),
    )


def _only(fields: Fields, *names: str) -> Fields:
    fields.only(names)
    return fields


def _files(fields: Fields) -> dict[str, FileEntry]:
    files = {}
    for name, value in fields.object("files").document.items():
        if not _NAME.fullmatch(name) or name == MANIFEST_FILE:
            raise UsageError(
                f"{fields.source}: files: impossible name {name!r:.60}: "
                "expected a plain file name in the bundle's folder"
            )
        files[name] = FileEntry.from_json(value, f"{fields.source}: file '{name}'")
    return files


def _preview(fields: Fields, model: Model) -> PreviewMap | None:
    document, channels = fields.document.get("preview"), model.pyramid.geometry.channels
    return None if document is None else PreviewMap.from_json(document, channels, f"{fields.source}: preview")


def _text(fields: Fields, model: Model, files: Mapping[str, FileEntry]) -> TextEntry | None:
    if fields.document.get("text") is None:
        return None
    text = fields.object("text")
    entry = TextEntry.from_json(text, model)
    if WEIGHTS_FILE not in files or entry.table.end > files[WEIGHTS_FILE].nbytes:
        raise text.object("table").wrong("rows", f"a table inside {WEIGHTS_FILE}")
    if TOKENIZER_FILE not in files:
        raise UsageError(f"{fields.source}: files: {TOKENIZER_FILE} is missing beside a text encoder")
    return entry
