"""Runs notebooks, and keeps in them what their cells gave, but for what is of one machine alone.

    pip install nbclient ipykernel
    python scripts/run_notebooks.py [NOTEBOOK …]

Without a name, all of `docs/notebooks/`. What went to stderr is left out, and so are the folders that files lie in.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
"""Columns that tables may take."""

STYLE = re.compile(r"\x1b\[[\d;]*m")
"""What a terminal makes bold, which pages would show as it stands."""


def run(notebook: Path) -> None:
    """Run a notebook, and write it with its outputs; a cell that fails ends it, and nothing is written.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    document = nbformat.read(notebook, as_version=4)
    metadata = dict(document.metadata)
    with TemporaryDirectory() as folder:
        settings = os.environ | {"NO_COLOR": "1", "COLUMNS": str(WIDTH), "TMPDIR": folder}
        where = {"metadata": {"path": str(notebook.parent)}}
        client = NotebookClient(document, timeout=1800, record_timing=False, coalesce_streams=True, resources=where)
        client.execute(env=settings)
        places = re.compile(rf"{re.escape(folder)}/\w+/|{re.escape(str(ROOT))}/")
    document.metadata = metadata
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.outputs = [_clean(output, places) for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(document, notebook)


def _clean(output: Any, places: re.Pattern[str]) -> Any:
    """An output whose text is plain, and names files without their folders."""
    holder, key = (output, "text") if "text" in output else (output.data, "text/plain")
    holder[key] = places.sub("", STYLE.sub("", holder[key].replace("\r\n", "\n")))
    return output


def main() -> None:
    """Run what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="all of them, where none is given")
    for notebook in parser.parse_args().notebooks or sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        run(notebook)
        print(f"{notebook.name}: {notebook.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
