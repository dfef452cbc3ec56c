"""`parity --html` and `quality --html`: pages that stand alone, say what was found, and trust nobody's words."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pyrexport.cli import main
from pyrexport.cli.reports.charts import Bar, Curve, Interval, bars, curves, intervals
from pyrexport.cli.reports.frames import FramePairs
from pyrexport.runtime.proof.trace import Trace
from support.builders import resign
from support.building import LEAN

av = pytest.importorskip("av")

EVIL = "<script>alert(1)</script> & \"quotes\" 'n' <img src=x onerror=alert(2)>"
QUIET = "--quiet"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and their text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(source: str) -> np.ndarray:
    """An embedded image, by a decoder that is not ours."""
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    with av.open(io.BytesIO(base64.b64decode(data, validate=True)), format="png_pipe") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.fixture(scope="session")
def trace(shared, tiny):
    """Two prompts of the tiny checkpoint, one of which tries to be markup."""

    def record(out: Path) -> None:
        words = ["--prompt", EVIL, "--prompt", "两只猫", "--schedule", "2-1-1"]
        result = CliRunner().invoke(main, ["parity", "--record", str(out), "--reference", str(tiny), *words, QUIET])
        assert result.exit_code == 0, result.output

    return shared(["trace for reports"], record)


@pytest.fixture(scope="session", params=["parity", "quality"])
def report(request, shared, bundle, trace):
    """The page of a good bundle, and the document on stdout beside it."""

    def write(out: Path) -> None:
        out.mkdir()
        command = [request.param, str(bundle), "--trace", str(trace), "--html", str(out / "a.html"), "--json", QUIET]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        (out / "a.json").write_text(result.stdout)

    folder = shared(["report", request.param], write)
    return Page(folder / "a.html"), json.loads((folder / "a.json").read_text()), request.param


def test_a_page_stands_by_itself(report):
    """Nothing is loaded, nothing runs, and the browser is told to see to it."""
    page, *_ = report
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_a_page_escapes_what_a_user_wrote(report):
    page, *_ = report
    assert EVIL in page.text
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert any(EVIL in image["alt"] for image in page.all("img"))


def test_a_page_says_what_was_found(report):
    page, document, command = report
    assert "passed" in page.words
    assert f"{command} passed: " in page.text
    for words in (
        "Error along the chain",
        "Frames",
        "Stages",
        "Machine and versions",
        "NumPy",
        "onnxruntime",
        "Python",
    ):
        assert words in page.text
    if command == "parity":
        for level in document["levels"].values():
            assert (
                f"{level['psnr']:.1f}" in page.text if "psnr" in level else f"{level['relative_l2']:.2e}" in page.text
            )
    else:
        assert f"{document['median']['psnr']:.1f} dB" in page.text


def test_frames_of_both_sides_and_their_difference_are_there(report, trace):
    """The reference's are the trace's own, to the pixel; the difference is what is between the rows above it."""
    page, *_ = report
    images = [decoded(image["src"]) for image in page.all("img")]
    assert len(images) == 2 * 3
    picks = (0, 3, 6, 10, 13, 16)
    for run in range(2):
        reference, found, difference = (image.astype(int) for image in images[3 * run : 3 * run + 3])
        frames = Trace(trace).tensor(f"run.{run}.frames")
        for place, frame in enumerate(picks):
            cell = (slice(1, 65), slice(66 * place + 1, 66 * place + 65))
            assert (reference[cell] == frames[frame]).all()
            apart = np.abs(found[cell] - reference[cell])
            factors = set((difference[cell][apart > 0] / apart[apart > 0]).tolist())
            assert factors <= {128.0}  # float32 on both sides: 8-bit frames are a rounding apart, if that
            assert not difference[cell][apart == 0].any()


def test_a_failing_parity_says_so(copy, trace, cli, tmp_path):
    latents = json.loads((copy / "manifest.json").read_text())["latents"]
    resign(copy, latents=latents | {"mean": [5.0] * 16})
    result = cli("parity", copy, "--trace", trace, "--html", tmp_path / "a.html", QUIET)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    page = Page(tmp_path / "a.html")
    assert "failed" in page.words
    assert " vae, video out of tolerance" in page.words
    assert {"verdict bad"} == {
        attributes["class"] for attributes in page.all("p") if "verdict" in attributes.get("class", "")
    }
    assert [bar["class"] for bar in page.all("rect")].count("bad") == 2


def test_a_page_replaces_an_old_one_and_leaves_nothing_beside_it(bundle, trace, cli, tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<!DOCTYPE html><head><meta name="generator" content="pyrexport">old')
    assert cli("parity", bundle, "--trace", trace, "--html", page, QUIET).exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["a.html"]


def test_a_trace_without_frames_is_a_page_without_frames(bundle, tiny, cli, tmp_path):
    how = ("--schedule", "1-1-1", "--prompt", "a", "--no-decode", "--html", tmp_path / "a.html", QUIET)
    assert cli("parity", bundle, "--reference", tiny, *how).exit_code == 0
    page = Page(tmp_path / "a.html")
    assert not page.all("img")
    assert "no video was decoded" in page.text


@pytest.mark.parametrize("command", ["parity", "quality"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.pdf", "--html writes a .html, found 'a.pdf'"),
        ("nowhere/a.html", "does not exist"),
        ("is.html", "is a folder"),
        ("mine.html", "is no report of pyrexport"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_work(bundle, trace, refused, tmp_path, command, name, words):
    (tmp_path / "is.html").mkdir()
    (tmp_path / "mine.html").write_text("mine")
    assert words in refused(command, bundle, "--trace", trace, "--html", tmp_path / name, QUIET)


@pytest.mark.parametrize("command", ["parity", "quality"])
def test_no_page_is_written_into_a_bundle(bundle, trace, refused, command):
    line = refused(command, bundle, "--trace", trace, "--html", bundle / "a.html", QUIET)
    assert "is a bundle, which holds its own files alone" in line


def test_a_recording_alone_has_no_page(tiny, refused, tmp_path):
    how = ("--record", tmp_path / "t", "--reference", tiny, "--html", tmp_path / "a.html")
    assert "give a BUNDLE" in refused("parity", *how)


def test_charts_draw_what_has_no_logarithm_and_what_is_not_finite():
    drawn = [
        bars([Bar("none", 0.0, "0", True), Bar("endless", 1e30, "1e30", False)]),
        curves([Curve("one", [0.0])], "t", logarithmic=True, across="x", limit=1e-4),
        curves([Curve("flat", [100.0, 100.0])], "t", logarithmic=False, across="x"),
        intervals([Interval("a", 0.0, 1e-3), Interval("b", -40.0, 2.0)], "t"),
    ]
    for picture in drawn:
        for element in picture.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                if name in element.attrib:
                    assert 0 <= float(element.attrib[name]) <= 900, (element.tag, element.attrib)


def test_large_frames_are_thinned_and_many_runs_are_cut():
    pairs, reference = FramePairs(), np.zeros((3, 480, 832, 3), np.uint8)
    for run in range(9):
        pairs(run, 0, np.zeros((2, 480, 832, 3), np.uint8), reference)
        pairs(run, 2, np.full((1, 480, 832, 3), 3, np.uint8), reference)
    assert [len(kept) for kept in pairs.kept.values()] == [3] * 4
    figure = pairs._figure(0, "run")
    assert "difference ×64" in "".join(figure.itertext())
    assert "is 3 of 255" in "".join(figure.itertext())
    for image in figure.iter("img"):
        assert decoded(image.attrib["src"]).shape == (122, 3 * 210, 3)


def test_frames_are_spread_over_the_whole_video_however_it_comes():
    pairs, reference = FramePairs(), np.arange(17, dtype=np.uint8).reshape(17, 1, 1, 1).repeat(3, 3)
    for start, end in ((0, 1), (1, 9), (9, 17)):
        pairs(0, start, reference[start:end], reference)
    assert [frame for frame, _, _ in pairs.kept[0]] == [0, 3, 6, 10, 13, 16]
    assert all(found.max() == other.max() == frame for frame, found, other in pairs.kept[0])


def test_the_quantised_page_draws_what_integers_hold(make_bundle, make_checkpoint, lean_recipe, tmp_path, cli):
    bundle = make_bundle(*LEAN, quantize="w8a8", recipe=str(lean_recipe))
    out = ("--html", tmp_path / "a.html", "--schedule", "1-1-1", QUIET)
    result = cli("parity", bundle, "--reference", make_checkpoint(*LEAN), *out)
    assert result.exit_code in (0, 1), result.output
    page = Page(tmp_path / "a.html")
    layers = len(json.loads((bundle / "manifest.json").read_text())["ranges"])
    assert layers
    pictures = [svg for svg in page.all("svg") if re.match(f"what the integers of {layers} inputs", svg["aria-label"])]
    assert len(pictures) == 3
