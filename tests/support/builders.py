"""What several test modules build."""

import json
from pathlib import Path
from typing import Any

from pyrexport.runtime.bundle.manifest import MANIFEST_FILE, signed
from pyrexport.runtime.chain.kinds import KINDS
from pyrexport.runtime.chain.levels import default_clean_levels, gain
from pyrexport.runtime.chain.pyramid import Pyramid, Resolution
from pyrexport.runtime.chain.wavelets import WAVELETS
from pyrexport.runtime.files import file_digest

FULL = Resolution(81, 448, 832)
"""The paper's."""
SMALL = Resolution(17, 64, 64)


def pyramid(kind: str = "pyramidal", stages: int = 3, **fields: Any) -> Pyramid:
    """A pyramid with the paper's facts, some of them replaced."""
    halves = KINDS[kind].halves
    defaults: dict[str, Any] = {
        "clean_levels": default_clean_levels(stages, gain(3)),
        "patch_sizes": ((1, 2, 2),) * stages,
        "taps": WAVELETS["haar"],
        "axes": "THW" if halves else "",
        "first_frame_apart": halves,
    }
    return Pyramid(kind=KINDS[kind], **(defaults | fields))


def resign(folder: Path, **fields: Any) -> None:
    """Replace fields of a bundle's manifest, hash its files again and sign it: only parity can notice then."""
    path = folder / MANIFEST_FILE
    document = json.loads(path.read_text()) | fields
    if "files" not in fields:
        document["files"] = {
            name: {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size}
            for name in document["files"]
        }
    path.write_text(json.dumps(signed(document)))
