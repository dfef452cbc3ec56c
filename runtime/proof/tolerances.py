"""What parity may cost: the tolerances of the schemes that a bundle is stored in, and of how it decodes."""

from collections.abc import Iterator, Mapping

from ..bundle.graphs import Decoder
from ..bundle.manifest import Manifest
from ..quantisation import ARITHMETIC

__all__ = ["tolerances_of"]

TEXT_LEVELS = ("ranges", "text", "chain", "video")
"""What the text encoder's rounding reaches: the chain runs free from the bundle's own embeddings."""

DECODED = "vae"
"""What schemes call the level of a decoder."""

TILED = {"video": 30.0}
"""Tolerance of a video that is decoded in tiles: the decoder's attention sees a tile alone, which no graph can mend."""

HALF_CACHES = {"vae": 3e-3, "video": 40.0}
"""Tolerances where the decoder's caches are kept in 11 bits."""


def tolerances_of(manifest: Manifest) -> dict[str, float]:
    """See `Scheme.tolerances`: the widest that anything asks for; those of a decoder are called as its component."""
    transformer, text = (manifest.scheme(component).tolerances for component in ("transformer", "text_encoder"))
    asked: list[Mapping[str, float]] = [
        {name: value for name, value in transformer.items() if name not in ("text", DECODED)},
        {name: text[name] for name in TEXT_LEVELS if name in text},
        {name: value for name, value in ARITHMETIC[manifest.compute].items() if name != DECODED},
    ]
    for decoder in manifest.decoders.values():
        asked += [_of_decoder(levels, decoder, manifest) for levels in _decoder_levels(decoder, manifest)]
    return {
        name: (min if name == "video" else max)(levels[name] for levels in asked if name in levels)
        for name in dict.fromkeys(name for levels in asked for name in levels)
    }


def _decoder_levels(decoder: Decoder, manifest: Manifest) -> Iterator[Mapping[str, float]]:
    yield manifest.scheme(decoder.component).tolerances
    yield ARITHMETIC[manifest.compute]
    if decoder.tiles.count > 1:
        yield TILED
    if decoder.caches == "float16":
        yield HALF_CACHES


def _of_decoder(levels: Mapping[str, float], decoder: Decoder, manifest: Manifest) -> dict[str, float]:
    """What a decoder reaches: its own level, and videos if it decodes them."""
    reached = {"ranges": "ranges", DECODED: decoder.component}
    if decoder == manifest.decoder:
        reached["video"] = "video"
    return {reached[name]: value for name, value in levels.items() if name in reached}
