"""The page: elements, its head, and writing it."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from ...runtime.errors import UsageError
from ...runtime.files import check_output, check_outside_bundles, write_whole

__all__ = ["Child", "check_page", "page", "section", "table", "tag", "write_page"]

Child = Element | str

GENERATOR = "pyrexport"
"""What a page says that it was made by."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: the images and the style that are in it."""


def tag(name: str, /, *children: Child, **attributes: str | float) -> Element:
    """An element; `stroke_width=2` is the attribute `stroke-width`, `class_` is `class`."""
    found = {key.rstrip("_").replace("_", "-"): _text(value) for key, value in attributes.items()}
    element = Element(name, found)
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.7g}"


def section(title: str, *children: Child) -> Element:
    """A part of the page under a heading."""
    return tag("section", tag("h2", title), *children)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Element:
    """Rows under a heading each; the first column names a row."""
    head = tag("tr", *(tag("th", column) for column in columns))
    body = [tag("tr", tag("th", row[0]), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def page(title: str, subtitle: str, *, passed: bool, verdict: str, sections: Iterable[Element]) -> Element:
    """The whole document.

    Args:
        title: what was checked.
        subtitle: of what.
        passed: the verdict.
        verdict: the same in a sentence.
        sections: what it rests on.
    """
    word, kind = ("passed", "good") if passed else ("failed", "bad")
    style = (files(__package__) / "style.css").read_text("utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} {word}: {subtitle}"),
        tag("style", style),
    )
    top = tag("header", tag("h1", title), tag("p", subtitle))
    answer = tag("p", tag("strong", word), f" {verdict}", class_=f"verdict {kind}")
    return tag("html", head, tag("body", top, answer, *sections), lang="en")


def check_page(path: Path) -> None:
    """Refuse, before the work, a page that could not be written.

    Raises:
        UsageError: it is another kind of file, or something else is in its way.
    """
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"--html writes a .html, found '{path.name}'")
    check_output(path)
    check_outside_bundles(path)
    if path.exists() and f'content="{GENERATOR}"'.encode() not in path.read_bytes()[:1000]:
        raise UsageError(f"{path} is no report of pyrexport: choose another name")


def write_page(path: Path, document: Element) -> None:
    """Write a page, whole or not at all."""
    text = "<!DOCTYPE html>\n" + tostring(document, encoding="unicode", method="html") + "\n"
    write_whole(path, text.encode("utf-8", "replace"))
