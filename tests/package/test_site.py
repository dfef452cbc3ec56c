"""The documentation: its links lead somewhere, and it becomes a site without a warning and without the network."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from check_docs import PAGES, anchors, broken_links, runnable, steps, text_of
from conftest import ROOT

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert not list(broken_links(page))


def test_a_link_that_leads_nowhere_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("check_docs.ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("# A `b`, c\n[x](#a-b-c) [y](#d) [z](gone.md) `[w](no-link.md)`\n```\n[v](code.md)\n```\n")
    assert [line.split(": ")[1] for line in broken_links(page)] == ["#d", "gone.md"]
    assert anchors(page.read_text()) == {"a-b-c"}


def test_what_runs_of_a_page_is_told_by_its_form():
    page = "```console\n$ a b\noutput\n```\n```\n$ c\n```\n"
    page += "```python\nimport numpy\n```\n```python\nimport pyrexport\n```\n"
    assert runnable(page) == [("console", "a b"), ("python", "import pyrexport\n")]


NOTEBOOKS = [page for page in PAGES if page.suffix == ".ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda page: page.name)
def test_a_notebook_is_run_and_shown_whole_and_holds_small_outputs_of_no_machine(notebook):
    text = notebook.read_text("utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # `scripts/run_notebooks.py`
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    told = "".join("".join(output.get("text") or output["data"]["text/plain"]) for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/|Traceback|\x1b", told)
    assert len(text) < 400_000
    ran, shown = steps(notebook), text_of(notebook)
    assert len(ran) >= len(code)
    assert shown.startswith("# ")
    assert all(text in shown for _, text in ran)
    assert shown.count("data:image/png") == sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_diagrams_need_no_script():
    """mkdocs-material would load mermaid from elsewhere."""
    assert not [page for page in PAGES if "```mermaid" in page.read_text("utf-8")]


class Loads(HTMLParser):
    """What a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADING.get(tag, ""))
        if address and dict(attrs).get("rel") != "canonical":
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install 'pyrexport[docs]'")
    out = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    return out


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text("utf-8"))
        for address in parser.found:
            assert not address.startswith(("http:", "https:", "//")), (page.name, address)
            if address.startswith("data:"):  # a picture that lies in the page itself
                continue
            assert page.name == "404.html" or (page.parent / address.partition("?")[0]).is_file(), (page.name, address)


def test_the_reference_has_what_users_call(site):
    chain, options = ((site / "api" / name).read_text("utf-8") for name in ("chain.html", "cli.html"))
    for name in ("levels.up", "resample.renoise_with", "schedules.Schedule.steps"):
        assert f'id="pyrexport.runtime.chain.{name}"' in chain
    assert 'id="pyrexport.export.bundle.build.build"' in (site / "api" / "index.html").read_text("utf-8")
    assert "<code>--html PATH</code>" in options


def test_every_page_is_in_the_navigation():
    """`mkdocs build` tells it too, where it is installed."""

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]  # type: ignore[union-attr]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    pages = (page.with_suffix(".md") for page in PAGES if page.is_relative_to(ROOT / "docs"))  # notebooks become such
    assert sorted(leaves(navigation)) == sorted(str(page.relative_to(ROOT / "docs")) for page in pages)
