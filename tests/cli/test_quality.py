"""`quality`: its verdict, its forms of output, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyrexport.cli import main
from support.builders import resign

QUIET = "--quiet"


@pytest.fixture(scope="session")
def trace(shared, tiny, cli_once):
    """Two prompts of the tiny checkpoint; the words are what tables and fonts could stumble over."""
    words = ("--prompt", "[/red] $x_{", "--prompt", "两只猫 in a prompt that is longer than a row of the table")
    return shared(
        ["trace for quality"],
        lambda out: cli_once("parity", "--record", out, "--reference", tiny, *words, QUIET),
    )


@pytest.fixture(scope="session")
def cli_once():
    def run(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    return run


def test_a_good_bundle_passes_with_a_table_and_a_plot(bundle, trace, cli, tmp_path, recwarn):
    result = cli("quality", bundle, "--trace", trace, "--plot", tmp_path / "plot.png", QUIET)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("quality passed: median PSNR ")
    for words in ("transformer fp32", "[/red] $x_{", "seed 0", "median", ">= 30", "<= 5 %"):
        assert words in result.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(recwarn)


def test_the_reference_is_sampled_where_there_is_no_trace(bundle, tiny, cli):
    how = ("--prompt", "a cat", "--seed", 3, "--schedule", "1-1-1", "--guidance-scale", 2)
    result = cli("quality", bundle, "--reference", tiny, *how, "--min-psnr", 60, "--json", QUIET)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert document["limits"] == {"min_psnr": 60, "max_motion_error": 0.05}
    (run,) = document["runs"]
    assert (run["prompt"], run["seed"], len(run["chain"])) == ("a cat", 3, 3)
    assert document["median"]["psnr"] == run["psnr"] > 60


def test_a_wrong_video_fails_though_its_chain_is_right(bundle, trace, cli, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    latents = json.loads((copy / "manifest.json").read_text())["latents"]
    resign(copy, latents=latents | {"mean": [5.0] * 16})
    result = cli("quality", copy, "--trace", trace, "--json", QUIET)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert document["median"]["relative_l2"] < 1e-4
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: quality failed: median PSNR ")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_have_an_error_that_is_a_number(make_bundle, trace, cli, precision):
    result = cli("quality", make_bundle(precision=precision), "--trace", trace, "--max-motion-error", 0, QUIET)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: quality failed: median motion error [\d.]+ % \(at most 0\)\n", result.stderr)
    assert "inf" not in result.stdout
    assert "nan" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}"], "either --reference CHECKPOINT or --trace FILE"),
        (["{bundle}", "--reference", "{tiny}", "--trace", "{trace}"], "either --reference CHECKPOINT or --trace FILE"),
        (
            ["{bundle}", "--reference", "{tiny}", "--prompt", "a", "--prompts", "{trace}"],
            "either --prompt or --prompts",
        ),
        (["{bundle}", "--trace", "{trace}", "--seed", "1"], "belong to --reference"),
        (["{bundle}", "--trace", "/nowhere"], "does not exist"),
        (["{bundle}", "--trace", "{bundle}/manifest.json"], "safetensors"),
        (["{bundle}", "--reference", "{ppf}"], "is another model"),
        (["{tiny}", "--trace", "{trace}"], "not a bundle"),
        (["{bundle}", "--trace", "{trace}", "--min-psnr", "nan"], "--min-psnr is in dB, from 0 to 100"),
        (["{bundle}", "--trace", "{trace}", "--max-motion-error", "-1"], "--max-motion-error is a ratio from 0"),
        (["{bundle}", "--trace", "{trace}", "--max-motion-error", "inf"], "--max-motion-error is a ratio from 0"),
        (["{bundle}", "--trace", "{trace}", "--plot", "a.pdf"], "--plot writes a .png, found 'a.pdf'"),
        (["{bundle}", "--trace", "{trace}", "--plot", "/nowhere/a.png"], "does not exist"),
        (["{blind}", "--reference", "{tiny}"], "has no VAE, and quality is judged by videos"),
    ],
)
def test_bad_input_is_refused(bundle, tiny, trace, make_checkpoint, make_bundle, refused, arguments, words):
    places = {"bundle": bundle, "tiny": tiny, "trace": trace}
    made = {"ppf": lambda: make_checkpoint("--kind", "ppf", "--no-vae"), "blind": lambda: make_bundle("--no-vae")}
    places |= {name: make() for name, make in made.items() if any(f"{{{name}}}" in word for word in arguments)}
    assert words in refused("quality", *(word.format(**places) for word in arguments), QUIET)


def test_a_plot_needs_matplotlib(bundle, trace, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.cli.plots.find_spec", lambda name: None)
    line = refused("quality", bundle, "--trace", trace, "--plot", tmp_path / "a.png", QUIET)
    assert "pip install 'pyrexport[plot]'" in line
