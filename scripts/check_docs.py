"""Runs what the pages show, and checks that their links lead somewhere.

In a ```console block, a line that begins with "$ " runs; so does a ```python block that imports pyrexport. The blocks
of a page run in order, in a folder of its own that holds the demonstration's checkpoints and an empty `demo/`. So do
the cells of a notebook, all of them, and what they define is there for the next ones.

    python scripts/check_docs.py [--links] [PAGE …]
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from click.testing import CliRunner
from notebooks import as_markdown, cells
from pyrexport.cli import main as pyrexport

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.ipynb"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def text_of(page: Path) -> str:
    """A page, or a notebook as one."""
    return as_markdown(page) if page.suffix == ".ipynb" else page.read_text("utf-8")


def steps(page: Path) -> list[tuple[str, str]]:
    """What runs of a page or a notebook: see `runnable`."""
    if page.suffix == ".ipynb":
        return [(kind, text) for kind, text in cells(page) if kind != "markdown"]
    return runnable(page.read_text("utf-8"))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def runnable(text: str) -> list[tuple[str, str]]:
    """What runs of a page, in order: `("console", a command)` or `("python", a block)`."""
    found: list[tuple[str, str]] = []
    for language, body in FENCE.findall(text):
        if language == "console":
            found += [(language, line[2:]) for line in body.splitlines() if line.startswith("$ ")]
        if language == "python" and re.search(r"^(import|from) pyrexport\b", body, re.MULTILINE):
            found.append((language, body))
    return found


def run_pages(pages: Iterable[Path], folder: Path) -> int:
    """Run pages in an empty folder, as a reader who goes from one to the next; how many commands and blocks ran.

    What one page has run already, the next one does not run again.

    Raises:
        AssertionError: one of them fails, or a command of pyrexport prints nothing.
    """
    (folder / "demo").mkdir()
    shutil.copytree(ROOT / "tests" / "data", folder / "tests" / "data")
    found = dict.fromkeys(step for page in pages for step in steps(page))
    defined: dict[str, object] = {"__name__": "__main__"}
    with chdir(folder):
        for language, text in found:
            if language == "python":
                exec(compile(text, "<a page>", "exec"), defined)
            else:
                _run(re.sub(r"\{(\w+)\}", lambda name: str(defined.get(name[1], name[0])), text))
    return len(found)


def _run(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program != "pyrexport":
        subprocess.run(["bash", "-c", command], check=True)
        return
    result = CliRunner().invoke(pyrexport, arguments)  # in this process: imports are most of a short command
    assert result.exit_code == 0, (command, result.output, result.exception)
    assert result.stdout.strip(), command


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page to files and headings that are not there."""
    for target in LINK.findall(_prose(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{page.relative_to(ROOT)}: {target}: there is no such file"
        elif anchor and anchor not in anchors(file.read_text("utf-8")):
            yield f"{page.relative_to(ROOT)}: {target}: there is no such heading"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links: on the site, and where repositories are shown."""
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(_without_fences(text)))
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def _prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", _without_fences(text))


def _without_fences(text: str) -> str:
    return FENCE.sub("", text)


def main() -> int:
    """Check the pages that are given; 1 where a link is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="all of them, where none is given")
    parser.add_argument("--links", action="store_true", help="check links alone")
    given = parser.parse_args()
    pages = [page.resolve() for page in given.pages] or PAGES
    broken = [line for page in pages for line in broken_links(page)]
    print("\n".join(broken) or f"links of {len(pages)} pages: all lead somewhere")
    for page in () if given.links else pages:
        start = time.monotonic()
        with TemporaryDirectory() as folder:
            count = run_pages([page], Path(folder))
        if count:
            print(f"{page.relative_to(ROOT)}: {count} ran in {time.monotonic() - start:.0f} s", flush=True)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
