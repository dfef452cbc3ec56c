"""Notebooks as pages: their cells in order, and as the Markdown that the site shows."""

import json
from pathlib import Path

__all__ = ["as_markdown", "cells"]


def cells(notebook: Path) -> list[tuple[str, str]]:
    """What a notebook holds, in order: `("markdown", text)`, `("console", a command)` or `("python", a cell)`.

    A cell of code is Python, or lines that begin with "!" and are commands.
    """
    found: list[tuple[str, str]] = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found.append(("markdown", text))
        elif text.startswith("!"):
            found += [("console", line.removeprefix("!")) for line in text.splitlines()]
        else:
            found.append(("python", text))
    return found


def as_markdown(notebook: Path) -> str:
    """A notebook as a page, which links to it."""
    shown = [f"The cells of [{notebook.name}]({notebook.name})."]
    for kind, text in cells(notebook):
        body = f"$ {text}" if kind == "console" else text
        shown.append(body if kind == "markdown" else f"```{kind}\n{body}\n```")
    return "\n\n".join([shown[1], shown[0], *shown[2:]]) + "\n"
