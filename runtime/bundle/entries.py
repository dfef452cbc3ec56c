"""The entries of a manifest: each one with its reader and its writer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..documents import Fields, is_number
from ..dtypes import DTYPES, WEIGHT_DTYPES
from ..errors import UsageError
from ..model.description import Model, parse_model
from ..model.families import DecoderConfig, TinyDecoderConfig, TransformerConfig, find_family
from ..quantisation import ARITHMETIC, COMPONENTS, DECODERS, FLOAT_SCHEMES, METHODS, SCHEMES
from .engines import Facts
from .graphs import GraphSpec, TensorSpec

__all__ = [
    "MAX_FRAME_RATE",
    "FileEntry",
    "GraphEntry",
    "TableEntry",
    "TextEntry",
    "is_digest",
    "read_frame_rate",
    "read_frequencies",
    "read_model",
    "read_parity",
    "read_ranges",
    "read_schemes",
    "read_statistics",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9A-Za-z]{1,20}){0,5}")
MAX_FRAME_RATE = 240


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    sha256: str
    nbytes: int

    @classmethod
    def from_json(cls, document: Any, source: str) -> "FileEntry":
        """Read an entry of `files`."""
        entry = Fields(document, source)
        entry.only(("sha256", "bytes"))
        return cls(entry.get("sha256", "64 hexadecimal digits", is_digest), entry.integer("bytes", least=0))

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {"sha256": self.sha256, "bytes": self.nbytes}


@dataclass(frozen=True)
class GraphEntry:
    """A graph: its file, what a run of it takes in memory, its inputs and outputs, and what its target says of it."""

    spec: GraphSpec
    file: str
    memory: int | None
    """Bytes of inputs, activations and outputs as planned when it was built, mapped weights not counted; or those that
    a run took then, with the weights that the engine packed. None where neither was done."""
    facts: Facts
    """What the target found out about it when it was built, and needs to open it."""

    @classmethod
    def from_json(cls, document: Any, spec: GraphSpec, files: Mapping[str, FileEntry], source: str) -> "GraphEntry":
        """Read an entry of `graphs`, which must be of the given graph.

        Raises:
            UsageError: it is not, or names no file of the bundle.
        """
        graph = Fields(document, f"{source}: graph '{spec.name}'")
        graph.only(("file", "memory", "inputs", "outputs", "facts"))
        file = graph.text("file")
        if file not in files:
            raise graph.wrong("file", "one of the manifest's files")
        memory = None if graph.document.get("memory") is None else graph.integer("memory", least=0)
        for kind, expected in (("inputs", spec.inputs), ("outputs", spec.outputs)):
            found = _tensor_specs(graph, kind)
            if found != {tensor.name: tensor for tensor in expected}:
                wanted = {tensor.name: f"{tensor.dtype} {list(tensor.shape)}" for tensor in expected}
                given = {tensor.name: f"{tensor.dtype} {list(tensor.shape)}" for tensor in found.values()}
                raise UsageError(f"{graph.source}: expected {kind} {wanted}, found {given}"[:400])
        return cls(spec, file, memory, graph.object("facts").document)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {
            "file": self.file,
            "memory": self.memory,
            "inputs": {tensor.name: tensor.to_json() for tensor in self.spec.inputs},
            "outputs": {tensor.name: tensor.to_json() for tensor in self.spec.outputs},
            "facts": dict(self.facts),
        }


def _tensor_specs(graph: Fields, kind: str) -> dict[str, TensorSpec]:
    specs = {}
    for name, value in graph.object(kind).document.items():
        fields = Fields(value, f"{graph.source}: {kind} '{name:.40}'")
        fields.only(("shape", "dtype"))
        shape = fields.get("shape", "a list of whole numbers", _is_shape)
        specs[name] = TensorSpec(name, tuple(shape), fields.text("dtype", choices=WEIGHT_DTYPES))
    return specs


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 2**63 for n in value)


@dataclass(frozen=True)
class TableEntry:
    """The embedding table in the weights file, one row per token."""

    offset: int
    rows: int
    width: int
    dtype: str

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.rows * self.width * DTYPES[self.dtype].nbytes


@dataclass(frozen=True)
class TextEntry:
    """The text encoder: the static lengths of its graphs, and the table that feeds them."""

    lengths: tuple[int, ...]
    table: TableEntry
    ftfy: str
    """Version of ftfy that cleaned prompts where it was built: another major version may give other tokens."""

    @classmethod
    def from_json(cls, text: Fields, model: Model) -> "TextEntry":
        """Read the field `text`.

        Raises:
            UsageError: the lengths or the table don't fit the model, or prompts are cleaned in a way that is unknown.
        """
        text.only(("lengths", "table", "cleaning"))
        lengths = text.get("lengths", "increasing whole numbers", _are_lengths)
        if lengths[-1] != model.text_length:
            raise text.wrong("lengths", f"{model.text_length} as the longest length")
        table = text.object("table")
        table.only(("offset", "rows", "width", "dtype"))
        entry = TableEntry(
            table.integer("offset", least=0),
            table.integer("rows"),
            table.integer("width"),
            table.text("dtype", choices=WEIGHT_DTYPES),
        )
        if entry.width != model.transformer.text_dim:
            raise table.wrong("width", f"{model.transformer.text_dim}, the transformer's text_dim")
        cleaning = text.object("cleaning")
        cleaning.only(("ftfy",))
        ftfy = cleaning.get(
            "ftfy", "a version such as 6.3.1", lambda v: isinstance(v, str) and bool(_VERSION.fullmatch(v))
        )
        return cls(tuple(lengths), entry, ftfy)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {"lengths": list(self.lengths), "table": vars(self.table), "cleaning": {"ftfy": self.ftfy}}


def _are_lengths(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(n) is int and 0 < n <= 4096 for n in value)
    return numbers and bool(value) and value == sorted(set(value))


def read_model(fields: Fields) -> Model:
    """The model of a bundle, with the decoders that it holds."""
    source = f"{fields.source}: transformer"
    document = fields.object("transformer").document
    decoders = fields.object("decoders")
    decoders.only(DECODERS.values())
    written = {name: decoders.object(name).object("config") for name in DECODERS.values() if name in decoders.document}
    vae = written.get(DECODERS["full"])
    family = find_family(document, None if vae is None else vae.document, source)
    config = family.read_transformer(document, source)
    model = parse_model(fields.object("model").document, family, config, f"{fields.source}: model")
    return replace(model, decoders={name: _decoder(name, own, model) for name, own in written.items()})


def _decoder(component: str, written: Fields, model: Model) -> DecoderConfig:
    if component == DECODERS["tiny"]:
        return TinyDecoderConfig.from_json(written, model.pyramid.geometry)
    return model.family.read_decoder(written.document, model.transformer, written.source)


def read_parity(fields: Fields, name: str) -> Mapping[str, Any]:
    """Results of parity that are kept in a manifest, by resolution."""
    kept = fields.object(name)
    kept.only(fields.document["resolutions"])
    for resolution in kept.document:
        parity = kept.object(resolution)
        parity.only(("passed", "levels"))
        parity.get("passed", "true or false", lambda v: isinstance(v, bool))
        parity.object("levels")
    return kept.document


def read_frame_rate(fields: Fields) -> int:
    """Frames a second of a bundle's videos."""
    expected = f"a whole number from 1 to {MAX_FRAME_RATE}"
    return int(fields.get("frame_rate", expected, lambda v: type(v) is int and 1 <= v <= MAX_FRAME_RATE))


def read_statistics(latents: Fields, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of latents, a number for each channel."""
    latents.only(("mean", "std"))
    mean, std = latents.numbers("mean"), latents.numbers("std")
    for name, values, least in (("mean", mean, -1e9), ("std", std, 1e-9)):
        if len(values) != channels or not all(least <= value <= 1e9 for value in values):
            raise latents.wrong(name, f"{channels} numbers of a size that latents have")
    return mean, std


def read_schemes(fields: Fields) -> tuple[dict[str, str], dict[str, str], str]:
    """Schemes by component of what is stored in floating-point numbers and in integers, and that of the arithmetic."""
    precision = fields.object("precision")
    integers = fields.object("quantised")
    precision.only((*COMPONENTS, "compute"))
    integers.only(COMPONENTS)
    given = [name for name in COMPONENTS if name in integers.document]
    return (
        {name: precision.text(name, choices=FLOAT_SCHEMES) for name in COMPONENTS},
        {name: integers.text(name, choices=METHODS) for name in given},
        precision.text("compute", choices=ARITHMETIC),
    )


def read_ranges(fields: Fields, quantised: Mapping[str, str], depth: int) -> dict[str, tuple[tuple[float, float], ...]]:
    """Of each layer whose input is rounded by constants: the interval that its integers hold in each stage."""
    ranges = fields.object("ranges")
    if ranges.document and all(SCHEMES[name].activations != "static" for name in quantised.values()):
        raise fields.wrong("ranges", "none, where no layer's input is rounded by constants")

    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) == depth and all(map(_is_interval, value))

    expected = f"for each of {depth} stage(s) an interval [low, high] that holds zero"
    return {
        name: tuple((float(low), float(high)) for low, high in ranges.get(name, expected, fits))
        for name in ranges.document
    }


def _is_interval(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
    return numbers and bool(value[0] <= 0 <= value[1] and value[0] < value[1])


def read_frequencies(fields: Fields, config: TransformerConfig) -> tuple[float, ...]:
    """Frequencies of the timestep features."""
    values = fields.numbers("timestep_frequencies")
    if 2 * len(values) != config.freq_dim or not all(0 < value <= 1 for value in values):
        raise fields.wrong("timestep_frequencies", f"{config.freq_dim // 2} numbers above 0 and at most 1")
    return values
