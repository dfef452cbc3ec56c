"""`--html FILE`: what `parity` and `quality` found, as one page that needs nothing beside it.

A page is a tree of elements, so that whatever a user wrote is escaped where it is serialised. It has no script, loads
nothing, and says so to the browser. Pages are drawn on devices too: they need NumPy and the standard library.
"""

from .frames import FramePairs, Kept
from .page import check_page, write_page
from .parity import LEVEL_COLUMNS, level_rows, parity_page, parity_verdict
from .quality import RUN_COLUMNS, quality_page, quality_verdict, run_rows
from .subject import Subject

__all__ = [
    "LEVEL_COLUMNS",
    "RUN_COLUMNS",
    "FramePairs",
    "Kept",
    "Subject",
    "check_page",
    "level_rows",
    "parity_page",
    "parity_verdict",
    "quality_page",
    "quality_verdict",
    "run_rows",
    "write_page",
]
