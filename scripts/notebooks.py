"""Notebooks as pages: their cells in order, and as the Markdown that the site shows."""

import json
from pathlib import Path
from typing import Any

__all__ = ["as_markdown", "cells"]


def cells(notebook: Path) -> list[tuple[str, str]]:
    """What a notebook holds, in order: `("markdown", text)`, `("console", a command)` or `("python", a cell)`.

    A cell of code is Python, or lines that begin with "!" and are commands.
    """
    return [part for cell in _read(notebook) for part in _parts(cell)]


def as_markdown(notebook: Path) -> str:
    """A notebook as a page, which links to it, with the outputs that are kept in it."""
    shown = [f"The cells of [{notebook.name}]({notebook.name}), and what they gave."]
    for cell in _read(notebook):
        for kind, text in _parts(cell):
            body = f"$ {text}" if kind == "console" else text
            shown.append(body if kind == "markdown" else f"```{kind}\n{body}\n```")
        shown += map(_output, cell.get("outputs", []))
    return "\n\n".join([shown[1], shown[0], *shown[2:]]) + "\n"


def _read(notebook: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(notebook.read_text("utf-8"))["cells"]
    return found


def _parts(cell: dict[str, Any]) -> list[tuple[str, str]]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [("markdown", text)]
    if text.startswith("!"):
        return [("console", line.removeprefix("!")) for line in text.splitlines()]
    return [("python", text)]


def _output(output: dict[str, Any]) -> str:
    """A picture, or text as it was printed."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell gave](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    return f"```\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
