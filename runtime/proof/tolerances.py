"""What parity may cost: the tolerances of the schemes that a bundle is stored in, and of how it decodes."""

from collections.abc import Mapping

from ..bundle.manifest import Manifest
from ..quantisation import ARITHMETIC, COMPONENTS

__all__ = ["tolerances_of"]

TEXT_LEVELS = ("ranges", "text", "chain", "video")
"""What the text encoder's rounding reaches: the chain runs free from the bundle's own embeddings."""

DECODER_LEVELS = ("ranges", "vae", "video")
"""What the decoder's rounding reaches."""

TILED = {"video": 30.0}
"""Tolerance of a video that is decoded in tiles: the decoder's attention sees a tile alone, which no graph can mend."""

HALF_CACHES = {"vae": 3e-3, "video": 40.0}
"""Tolerances where the decoder's caches are kept in 11 bits."""


def tolerances_of(manifest: Manifest) -> dict[str, float]:
    """See `Scheme.tolerances`: the widest that anything asks for."""
    transformer, text, decoder = (manifest.scheme(component).tolerances for component in COMPONENTS)
    asked: list[Mapping[str, float]] = [
        {name: value for name, value in transformer.items() if name not in ("text", "vae")},
        {name: text[name] for name in TEXT_LEVELS if name in text},
        {name: decoder[name] for name in DECODER_LEVELS if name in decoder},
    ]
    asked.append(ARITHMETIC[manifest.compute])
    if manifest.decoder is not None and manifest.decoder.tiles.count > 1:
        asked.append(TILED)
    if manifest.decoder is not None and manifest.decoder.caches == "float16":
        asked.append(HALF_CACHES)
    return {
        name: (min if name == "video" else max)(levels[name] for levels in asked if name in levels)
        for name in dict.fromkeys(name for levels in asked for name in levels)
    }
