"""What parity may cost: the tolerances of the schemes that a bundle is stored in, and of how it decodes."""

from collections.abc import Mapping

from ..bundle.manifest import Manifest
from ..quantisation import SCHEMES

__all__ = ["tolerances_of"]

TEXT_LEVELS = ("text", "chain", "video")
"""What the text encoder's rounding reaches: the chain runs free from the bundle's own embeddings."""

TILED = {"video": 30.0}
"""Tolerance of a video that is decoded in tiles: the decoder's attention sees a tile alone, which no graph can mend."""

HALF_CACHES = {"vae": 3e-3, "video": 40.0}
"""Tolerances where the decoder's caches are kept in 11 bits."""


def tolerances_of(manifest: Manifest) -> dict[str, float]:
    """Largest relative L2 error by level, and for `video` the least PSNR in dB: the widest that anything asks for."""
    stored, text = SCHEMES[manifest.storage].tolerances, SCHEMES[manifest.text_storage].tolerances
    asked: list[Mapping[str, float]] = [stored, {name: text[name] for name in TEXT_LEVELS}]
    if manifest.decoder is not None and manifest.decoder.tiles.count > 1:
        asked.append(TILED)
    if manifest.decoder is not None and manifest.decoder.caches == "float16":
        asked.append(HALF_CACHES)
    widest = {
        name: (min if name == "video" else max)(levels[name] for levels in asked if name in levels) for name in stored
    }
    return widest | {"text": text["text"]}
