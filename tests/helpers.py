"""What several test modules build."""

from pyrexport.runtime.levels import default_clean_levels, gain
from pyrexport.runtime.pyramid import Pyramid, Resolution
from pyrexport.runtime.wavelets import WAVELETS

FULL = Resolution(81, 448, 832)


def pyramid(kind: str = "pyramidal", stages: int = 3, **fields) -> Pyramid:
    """A pyramid with the paper's facts, some of them replaced."""
    defaults = {
        "clean_levels": default_clean_levels(stages, gain(3)),
        "resolution": FULL,
        "patch_sizes": ((1, 2, 2),) * stages,
        "taps": WAVELETS["haar"],
        "axes": "THW" if kind == "pyramidal" else "",
        "first_frame_apart": kind == "pyramidal",
    }
    return Pyramid(kind=kind, **(defaults | fields))
