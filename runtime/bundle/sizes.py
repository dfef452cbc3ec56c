"""What a bundle holds for each of its resolutions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chain.pyramid import Resolution
from ..documents import Fields
from ..errors import UsageError
from ..model.description import Model
from ..quantisation import CACHE_SCHEMES, SCHEMES
from .entries import FileEntry, GraphEntry
from .graphs import Decoder, GraphKey, graph_specs
from .tiles import SMALLEST_TILE, Tiles

__all__ = ["Size", "decoder_json", "decoders_json", "entries_of", "read_sizes"]

CACHES = tuple(SCHEMES[name].dtype for name in CACHE_SCHEMES)


@dataclass(frozen=True)
class Size:
    """What is sampled at one resolution."""

    resolution: Resolution
    decoders: Mapping[str, Decoder]
    """By component, those of `DECODERS` that the model has."""
    graphs: Mapping[GraphKey, GraphEntry]
    """By keys that say no resolution; an entry's own key does. Graphs of text, and of decoders with the same tile, are
    also other sizes'."""


def read_sizes(
    fields: Fields, model: Model, lengths: Sequence[int], files: Mapping[str, FileEntry]
) -> tuple[Size, ...]:
    """Read the fields `resolutions`, `decoders` and `graphs`.

    Args:
        fields: the manifest.
        model: that it is of.
        lengths: static lengths of the text encoder's graphs.
        files: the bundle's files.

    Raises:
        UsageError: a resolution is not the model's, tiles don't fit a frame, or the graphs are not exactly those that
            the model has, with their inputs and outputs.
    """
    decoders = {resolution: _decoders(fields, model, resolution) for resolution in _resolutions(fields)}
    for component in model.decoders:
        fields.object("decoders").object(component).object("frames").only([str(resolution) for resolution in decoders])
    written, seen, sizes = fields.object("graphs").document, set(), []
    for resolution, specs in graph_specs(model, decoders, lengths).items():
        graphs = {}
        for key, spec in specs.items():
            if spec.name not in written:
                raise UsageError(f"{fields.source}: graph '{spec.name}' is missing")
            graphs[key] = GraphEntry.from_json(written[spec.name], spec, files, fields.source)
            seen.add(spec.name)
        own = {decoder.component: decoder for decoder in decoders[resolution]}
        sizes.append(Size(resolution, own, graphs))
    extra = sorted(written.keys() - seen)
    if extra:
        raise UsageError(f"{fields.source}: unexpected graph '{extra[0]:.40}'")
    return tuple(sizes)


def _resolutions(fields: Fields) -> list[Resolution]:
    def are(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)

    found = [Resolution.parse(text) for text in fields.get("resolutions", "a list of resolutions", are)]
    if len(set(found)) < len(found):
        raise fields.wrong("resolutions", "each once")
    return found


def _decoders(fields: Fields, model: Model, resolution: Resolution) -> list[Decoder]:
    """How frames of a resolution, which must be one of the model's, are decoded."""
    try:
        _, _, *frame = model.stages(resolution)[0].latent
    except UsageError as error:
        raise UsageError(f"{fields.source}: {error}") from None
    found, spatial = [], model.pyramid.geometry.spatial
    for component in model.decoders:
        written = fields.object("decoders").object(component)
        written.only(("config", "frames", "caches", "packed"))
        packed = written.get("packed", "true or false", lambda v: isinstance(v, bool))
        tiles = _tiles(written.object("frames").object(str(resolution)), (frame[0], frame[1]), spatial)
        found.append(Decoder(component, tiles, written.text("caches", choices=CACHES), packed))
    return found


def _tiles(fields: Fields, frame: tuple[int, int], spatial: int) -> Tiles:
    """How a frame of a size in latent pixels is cut."""
    fields.only(("tile", "tiles", "overhead"))

    def fits(value: Any) -> bool:
        two = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
        return two and all(min(SMALLEST_TILE, size) <= n <= size for n, size in zip(value, frame, strict=True))

    tile = fields.get("tile", f"height and width of a tile, at most {frame[0]} and {frame[1]}", fits)
    tiles = Tiles(frame, (tile[0], tile[1]), spatial)
    if fields.integer("tiles") != tiles.count:
        raise fields.wrong("tiles", f"{tiles.count} of that size")
    fields.get("overhead", f"{tiles.overhead:.4g}", lambda v: v == round(tiles.overhead, 4))
    return tiles


def _tiles_json(tiles: Tiles) -> dict[str, Any]:
    return {"tile": list(tiles.tile), "tiles": tiles.count, "overhead": round(tiles.overhead, 4)}


def decoder_json(decoder: Decoder) -> dict[str, Any]:
    """How frames are decoded, for people."""
    return {**_tiles_json(decoder.tiles), "caches": decoder.caches}


def decoders_json(sizes: Sequence[Size], model: Model) -> dict[str, Any]:
    """The field `decoders` of a model's bundle, by component."""
    found = {}
    for component, config in model.decoders.items():
        first = sizes[0].decoders[component]
        frames = {str(size.resolution): _tiles_json(size.decoders[component].tiles) for size in sizes}
        found[component] = {
            "config": config.to_json(),
            "frames": frames,
            "caches": first.caches,
            "packed": first.packed,
        }
    return found


def entries_of(sizes: Sequence[Size]) -> dict[str, GraphEntry]:
    """Every graph once, by its own name."""
    return {entry.spec.name: entry for size in sizes for entry in size.graphs.values()}
