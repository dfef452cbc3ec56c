"""What the pages show runs as it stands there, on the checkpoints that they name."""

import json

import pytest
from check_docs import blocks, run_pages
from conftest import ROOT
from pyrexport.runtime.documents import Fields
from pyrexport.runtime.model.description import parse_model, parse_resolution
from pyrexport.runtime.model.families.wan import WAN, WanConfig


def test_a_page_of_mathematics_holds(tmp_path):
    assert run_pages([ROOT / "docs" / "mathematics.md"], tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "count"), [(("README.md", "docs/start.md"), 4), (("docs/own.md",), 4), (("docs/quality.md",), 4)]
)
def test_pages_run_from_the_first_command_to_the_last(pages, count, tmp_path):
    """About a minute each, most of it builds. What takes longer is run by `scripts/check_docs.py`."""
    assert run_pages([ROOT / page for page in pages], tmp_path) == count
    assert any((tmp_path / "demo").iterdir())


def test_the_pyramid_json_that_is_shown_is_one():
    (text,) = blocks((ROOT / "docs" / "own.md").read_text("utf-8"), "json")
    document = json.loads(text)
    size = Fields({"resolution": document.pop("resolution")}, "own.md")
    model = parse_model(document, WAN, WanConfig(), "own.md")
    assert model.stages(parse_resolution(size))
    for name, schedule in document["schedules"].items():
        document["schedules"][name] = {"solver": "euler"} | schedule  # the only field that it may leave out
    assert model.to_json() == document
