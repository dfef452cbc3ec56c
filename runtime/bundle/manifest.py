"""The manifest of a bundle: what it holds, what it needs, and what proves that it is whole."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..chain.pyramid import VAE_SPATIAL
from ..documents import Fields
from ..errors import UsageError
from ..model.description import ModelDescription, describe_model
from ..model.families.wan import WanConfig
from .tiles import SMALLEST_TILE, TilePlan

__all__ = [
    "CACHE_PRECISIONS",
    "FORMAT",
    "MANIFEST_FILE",
    "PACKED",
    "PRECISIONS",
    "TEXT_PRECISIONS",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "TableEntry",
    "TextEntry",
    "VaeEntry",
    "cache_names",
    "is_capability",
    "parse_manifest",
    "signed",
]

FORMAT = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
TEXT_PRECISIONS = {**PRECISIONS, "int8": "int8", "int4": "int4"}
"""A text encoder's matrices can be quantised, in blocks that share a scale."""
CACHE_PRECISIONS = {"fp32": "float32", "fp16": "float16"}
"""Of what the decoder keeps from frame to frame."""
PACKED = "packed"
"""Output of a decoder whose frames and new caches are one flat tensor, in this order."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class GraphEntry:
    """A graph: its file, what a run of it takes in memory, and shape and dtype of its inputs and outputs by name."""

    file: str
    memory: int | None
    """Bytes: of inputs, activations and outputs as planned when it was built, mapped weights not counted; or of a run then, with
    the weights that the engine packed. None where neither was done."""
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    """What the target found out about it when it was built, and needs to open it."""


@dataclass(frozen=True)
class TableEntry:
    """The embedding table in the weights file, one row per token."""

    offset: int
    rows: int
    width: int
    dtype: str


@dataclass(frozen=True)
class TextEntry:
    """The text encoder: static lengths, one graph `text_LENGTH` each, and the table that feeds them."""

    lengths: tuple[int, ...]
    table: TableEntry


@dataclass(frozen=True)
class VaeEntry:
    """How frames are decoded: the tiles, one as large as the frame where it is decoded whole, and the caches' dtype."""

    tiles: TilePlan
    caches: str


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every field has been checked."""

    target: str
    engine: str
    engine_version: str
    model: ModelDescription
    config: WanConfig
    storage: str
    text_storage: str
    compute: str
    timestep_frequencies: tuple[float, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    text: TextEntry | None
    vae: VaeEntry | None
    graphs: Mapping[str, GraphEntry]
    files: Mapping[str, FileEntry]
    weight_bytes: int
    provenance: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    graph_parity: Mapping[str, Any] | None
    """Of the networks that engines were built from, evaluated on ONNX Runtime."""
    document: Mapping[str, Any]


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own hash left out."""
    content = {key: value for key, value in document.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def signed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the hash of its content."""
    return {**document, "hash": digest(document)}


def cache_names(count: int, *, new: bool = False) -> list[str]:
    """Names of the caches that a decoder graph takes, or of the new ones that it gives."""
    return [f"new_cache_{index}" if new else f"cache_{index}" for index in range(count)]


def parse_manifest(document: Any, source: str) -> Manifest:
    """Check a manifest.

    Raises:
        UsageError: a field is missing, unknown or impossible, or the content is not what its hash says.
    """
    fields = Fields(document, source)
    if fields.get("format", "a whole number", lambda v: type(v) is int) != FORMAT:
        raise fields.wrong("format", f"{FORMAT} (another format needs another version of pyrexport)")
    fields.only((
        "format", "target", "engine", "model", "transformer", "precision", "timestep_frequencies", "latents", "text",
        "vae", "graphs", "weights", "files", "provenance", "parity", "graph_parity", "hash",
    ))  # fmt: skip
    if fields.text("hash") != digest(fields.document):
        raise UsageError(
            f"{source} was changed after the bundle was built: its content is not what its hash says; build or fetch the bundle again"
        )
    config = WanConfig.from_json(
        {**fields.object("transformer").document, "_class_name": "WanTransformer3DModel"}, f"{source}: transformer"
    )
    engine = fields.object("engine")
    engine.only(("name", "version"))
    precision = fields.object("precision")
    precision.only(("storage", "text", "compute"))
    files = _files(fields)
    model = describe_model(fields.object("model").document, config, f"{source}: model")
    manifest = Manifest(
        target=fields.text("target"),
        engine=engine.text("name"),
        engine_version=engine.text("version"),
        model=model,
        config=config,
        storage=precision.text("storage", choices=PRECISIONS),
        text_storage=precision.text("text", choices=TEXT_PRECISIONS),
        compute=precision.text("compute", choices=PRECISIONS),
        timestep_frequencies=_frequencies(fields, config),
        **_latents(fields, config),
        text=_text(fields, files, config),
        vae=_vae(fields, model),
        graphs=_graphs(fields, files),
        files=files,
        weight_bytes=fields.object("weights").integer("bytes", least=0),
        provenance=fields.object("provenance").document,
        parity=_parity(fields, "parity"),
        graph_parity=_parity(fields, "graph_parity"),
        document=fields.document,
    )
    _check_graphs(manifest, source)
    return manifest


def _files(fields: Fields) -> dict[str, FileEntry]:
    files = {}
    for name, value in fields.object("files").document.items():
        if not _NAME.fullmatch(name) or name == MANIFEST_FILE:
            raise UsageError(
                f"{fields.source}: files: impossible name {name!r:.60}: expected a plain file name in the bundle's folder"
            )
        entry = Fields(value, f"{fields.source}: file '{name}'")
        entry.only(("sha256", "bytes"))
        sha256 = entry.get(
            "sha256", "64 hexadecimal digits", lambda v: isinstance(v, str) and bool(_DIGEST.fullmatch(v))
        )
        files[name] = FileEntry(sha256, entry.integer("bytes", least=0))
    return files


def _parity(fields: Fields, name: str) -> Mapping[str, Any] | None:
    if fields.document.get(name) is None:
        return None
    parity = fields.object(name)
    parity.only(("passed", "levels"))
    parity.get("passed", "true or false", lambda v: isinstance(v, bool))
    parity.object("levels")
    return parity.document


def _frequencies(fields: Fields, config: WanConfig) -> tuple[float, ...]:
    values = fields.numbers("timestep_frequencies")
    if 2 * len(values) != config.freq_dim or not all(0 < value <= 1 for value in values):
        raise fields.wrong("timestep_frequencies", f"{config.freq_dim // 2} numbers above 0 and at most 1")
    return values


def _latents(fields: Fields, config: WanConfig) -> dict[str, tuple[float, ...]]:
    latents = fields.object("latents")
    latents.only(("mean", "std"))
    mean, std = latents.numbers("mean"), latents.numbers("std")
    for name, values in (("mean", mean), ("std", std)):
        inside = all((1e-9 if name == "std" else -1e9) <= value <= 1e9 for value in values)
        if len(values) != config.in_channels or not inside:
            raise latents.wrong(name, f"{config.in_channels} numbers of a size that latents have")
    return {"latents_mean": mean, "latents_std": std}


def _text(fields: Fields, files: Mapping[str, FileEntry], config: WanConfig) -> TextEntry | None:
    if fields.document.get("text") is None:
        return None
    text = fields.object("text")
    text.only(("lengths", "table"))

    def valid(value: Any) -> bool:
        numbers = isinstance(value, list) and all(type(n) is int and 0 < n <= 4096 for n in value)
        return numbers and bool(value) and value == sorted(set(value))

    lengths = text.get("lengths", "increasing whole numbers", valid)
    table = text.object("table")
    table.only(("offset", "rows", "width", "dtype"))
    entry = TableEntry(
        table.integer("offset", least=0),
        table.integer("rows"),
        table.integer("width"),
        table.text("dtype", choices=PRECISIONS.values()),
    )
    size = entry.rows * entry.width * (4 if entry.dtype == "float32" else 2)
    if WEIGHTS_FILE not in files or entry.offset + size > files[WEIGHTS_FILE].nbytes:
        raise table.wrong("rows", f"a table inside {WEIGHTS_FILE}")
    if entry.width != config.text_dim:
        raise table.wrong("width", f"{config.text_dim}, the transformer's text_dim")
    if TOKENIZER_FILE not in files:
        raise UsageError(f"{fields.source}: files: {TOKENIZER_FILE} is missing beside a text encoder")
    return TextEntry(tuple(lengths), entry)


def _vae(fields: Fields, model: ModelDescription) -> VaeEntry | None:
    if fields.document.get("vae") is None:
        return None
    vae = fields.object("vae")
    vae.only(("tile", "tiles", "overhead", "caches"))
    _, _, height, width = model.pyramid.stages[0].latent

    def fits(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(
                type(n) is int and min(SMALLEST_TILE, size) <= n <= size
                for n, size in zip(value, (height, width), strict=True)
            )
        )

    tile = vae.get("tile", f"height and width of a tile, at most {height} and {width}", fits)
    plan = TilePlan((height, width), (tile[0], tile[1]))
    if vae.integer("tiles") != plan.count:
        raise vae.wrong("tiles", f"{plan.count} of that size")
    vae.get("overhead", f"{plan.overhead:.4g}", lambda v: v == round(plan.overhead, 4))
    return VaeEntry(plan, vae.text("caches", choices=CACHE_PRECISIONS.values()))


def _graphs(fields: Fields, files: Mapping[str, FileEntry]) -> dict[str, GraphEntry]:
    graphs = {}
    for name, value in fields.object("graphs").document.items():
        graph = Fields(value, f"{fields.source}: graph '{name:.40}'")
        graph.only(("file", "memory", "inputs", "outputs", "facts"))
        file = graph.text("file")
        if file not in files:
            raise graph.wrong("file", "one of the manifest's files")
        memory = None if graph.document.get("memory") is None else graph.integer("memory", least=0)
        graphs[name] = GraphEntry(file, memory, _specs(graph, "inputs"), _specs(graph, "outputs"), _facts(graph))
    return graphs


def is_capability(value: Any) -> bool:
    """Whether it is a GPU's compute capability, such as "8.9"."""
    return isinstance(value, str) and bool(re.fullmatch(r"\d{1,2}\.\d", value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _facts(graph: Fields) -> Mapping[str, Any]:
    """What a target wrote of a graph; those that are read again must be what they are read as."""
    facts = graph.object("facts")
    kinds: dict[str, Callable[[Any], bool]] = {
        "compute_capabilities": lambda v: isinstance(v, list) and bool(v) and all(map(is_capability, v)),
        "library": lambda v: v in ("tensorrt", "tensorrt-rtx"),
        "network": lambda v: isinstance(v, str) and bool(_DIGEST.fullmatch(v)),
        "activation_bytes": lambda v: v is None or _is_count(v),
        **dict.fromkeys(("attention", "fused_attention", "products", "weights_bytes"), _is_count),
    }
    for name in facts.document.keys() & kinds.keys():
        facts.get(name, "what a target writes there", kinds[name])
    if "network" in facts.document and kinds.keys() - facts.document.keys():
        raise facts.wrong("network", f"{', '.join(sorted(kinds))} beside it")
    return facts.document


def _specs(graph: Fields, name: str) -> dict[str, dict[str, Any]]:
    specs = {}
    for key, value in graph.object(name).document.items():
        spec = Fields(value, f"{graph.source}: {name} '{key:.40}'")
        spec.only(("shape", "dtype"))
        shape = spec.get(
            "shape",
            "a list of whole numbers",
            lambda v: isinstance(v, list) and all(type(n) is int and 0 < n < 2**31 for n in v),
        )
        specs[key] = {"shape": list(shape), "dtype": spec.text("dtype", choices=PRECISIONS.values())}
    return specs


def _check_graphs(manifest: Manifest, source: str) -> None:
    """The graphs must be those that the model and the text entry ask for, with their shapes."""
    model, config = manifest.model, manifest.config
    expected: dict[str, tuple[dict[str, list[int]], dict[str, list[int]]]] = {}
    for stage in model.pyramid.stages:
        latent = [1, *stage.latent]
        inputs = {
            "latent": latent,
            "timestep_features": [1, config.freq_dim],
            "text": [1, model.text_length, config.text_dim],
        }
        expected[f"stage{stage.index}"] = (inputs, {"velocity": latent})
    for length in manifest.text.lengths if manifest.text else ():
        shape = [1, length, config.text_dim]
        expected[f"text_{length}"] = ({"embeddings": shape, "mask": [1, length]}, {"text": shape})
    for name, (inputs, outputs) in expected.items():
        _same_specs(manifest, source, name, inputs, outputs)
    if manifest.text and manifest.text.lengths[-1] != model.text_length:
        raise UsageError(
            f"{source}: text: expected {model.text_length} as the longest length, found {manifest.text.lengths[-1]}"
        )
    _check_vae(manifest, source)
    decoder = {"vae_first", "vae_next"} if manifest.vae else set()
    extra = sorted(manifest.graphs.keys() - expected.keys() - decoder)
    if extra:
        raise UsageError(f"{source}: unexpected graph '{extra[0]:.40}'")


def _check_vae(manifest: Manifest, source: str) -> None:
    if manifest.vae is None:
        return
    channels = manifest.model.pyramid.stages[0].latent[0]
    height, width = manifest.vae.tiles.tile
    first, later = manifest.graphs.get("vae_first"), manifest.graphs.get("vae_next")
    size = [3, height * VAE_SPATIAL, width * VAE_SPATIAL]
    latent = {"latent": [1, channels, height, width]}
    if first and later and PACKED in first.outputs:
        (kept,) = (later.inputs.get("cache_0") or {"shape": [0]})["shape"][:1]
        _same_specs(manifest, source, "vae_first", latent, {PACKED: [math.prod(size) + kept]})
        _same_specs(manifest, source, "vae_next", latent | {"cache_0": [kept]}, {PACKED: [4 * math.prod(size) + kept]})
        return
    caches = {name: spec["shape"] for name, spec in (first.outputs if first else {}).items() if name != "frames"}
    if list(caches) != cache_names(len(caches), new=True) or not caches:
        raise UsageError(f"{source}: graph 'vae_first': expected outputs frames, new_cache_0, new_cache_1, …")
    old = dict(zip(cache_names(len(caches)), caches.values(), strict=True))
    _same_specs(manifest, source, "vae_first", latent, {"frames": [1, *size], **caches})
    _same_specs(manifest, source, "vae_next", latent | old, {"frames": [4, *size], **caches})
    for graph in (manifest.graphs["vae_first"].outputs, manifest.graphs["vae_next"].inputs):
        odd = next((n for n, spec in graph.items() if "cache" in n and spec["dtype"] != manifest.vae.caches), None)
        if odd is not None:
            raise UsageError(f"{source}: '{odd}': expected dtype {manifest.vae.caches}, found {graph[odd]['dtype']}")


def _same_specs(
    manifest: Manifest, source: str, name: str, inputs: Mapping[str, list[int]], outputs: Mapping[str, list[int]]
) -> None:
    if name not in manifest.graphs:
        raise UsageError(f"{source}: graph '{name}' is missing")
    graph = manifest.graphs[name]
    for kind, found, wanted in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        shapes = {key: spec["shape"] for key, spec in found.items()}
        if shapes != wanted:
            raise UsageError(f"{source}: graph '{name}': expected {kind} {dict(wanted)}, found {shapes}"[:400])
