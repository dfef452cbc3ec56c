"""Traces: what they hold, and what is refused of a damaged or tampered one; results that are kept."""

import json

import numpy as np
import pytest
from pyrexport.runtime.proof.trace import Trace
from safetensors.numpy import load_file
from support.parity import parity, tampered


def test_the_result_can_be_kept_in_the_manifest(good, copy, cli):
    result = cli("parity", copy, "--trace", good[1], "--store", "--quiet")
    assert result.exit_code == 0, result.output
    assert "PSNR" in result.stdout
    document = json.loads(cli("inspect", copy, "--json", "--quiet").stdout)
    assert document["parity"]["passed"] is True
    assert document["parity"]["levels"]["stages"]["relative_l2"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}"], "either --reference"),
        (["{bundle}", "--trace", "/nowhere"], "does not exist"),
        (["{bundle}", "--trace", "{bundle}/manifest.json"], "safetensors"),
        (["{bundle}", "--trace", "{other}"], "samples at 17x64x128, found 17x64x64"),
        (["--trace", "{trace}"], "give a BUNDLE"),
        (["{bundle}", "--trace", "{trace}", "--bisect"], "--bisect needs --reference"),
        (["/nowhere", "--trace", "{trace}"], "not a bundle"),
        (["{bundle}", "--trace", "{trace}", "--no-decode"], "belong to recording"),
        (["{bundle}", "--trace", "{trace}", "--prompt", "a"], "belong to recording"),
    ],
)
def test_wrong_arguments_are_refused(good, record, refused, arguments, words):
    places = {"{bundle}": good[0], "{trace}": good[1], "{other}": record()}
    filled = []
    for argument in arguments:
        for mark, place in places.items():
            argument = argument.replace(mark, str(place))
        filled.append(argument)
    assert words in refused("parity", *filled, "--quiet")


@pytest.mark.parametrize(
    ("describe", "change"),
    [
        (lambda d: d.update(runs=[]), None),
        (lambda d: d.update(probes=[]), None),
        (lambda d: d["probes"][0].update(stage=7), None),
        (lambda d: d["runs"][0].update(levels=["a"]), None),
        (lambda d: d["runs"][0].update(levels=[[1.0]]), None),
        (lambda d: d["runs"][0].update(levels=[[1.0], [0.99], [0.5]]), None),
        (lambda d: d.update(probes=d["probes"][:1]), None),
        (lambda d: d.update(texts=None), None),
        (lambda d: d["runs"][0].update(guidance_scale=1e299), None),
        (lambda d: d["runs"][0].update(solver="unknown"), None),
        (None, lambda t: t.pop("vae.latent")),
        (None, lambda t: t.update({"vae.latent": t["vae.latent"][:, :0].copy()})),
        (None, lambda t: t.update({"probe.0.velocity": t["probe.0.velocity"].reshape(-1).copy()})),
        (None, lambda t: t.update({"run.0.step.0.velocity": t["run.0.step.0.velocity"].reshape(-1).copy()})),
        (None, lambda t: t.pop("run.0.step.3.before")),
        (None, lambda t: t.update({"probe.0.velocity": t["probe.0.velocity"][:1].copy()})),
        (None, lambda t: t.update({"vae.frames": t["vae.frames"].reshape(-1).copy()})),
        (None, lambda t: t.update({"run.0.frames": t["run.0.frames"][:3].copy()})),
    ],
)
def test_a_tampered_trace_is_refused(good, refused, tmp_path, describe, change):
    refused("parity", good[0], "--trace", tampered(good[1], tmp_path / "t.safetensors", describe, change), "--quiet")


def test_a_reference_that_is_not_finite_does_not_pass(good, tmp_path):
    def change(tensors):
        tensors["probe.3.velocity"][0, 0, 0, 0] = np.nan

    levels = parity(good[0], tampered(good[1], tmp_path / "t.safetensors", change=change))["levels"]
    assert not levels["stages"]["passed"]


def test_a_damaged_trace_is_refused(good, refused, tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(good[1].read_bytes()[:-7])
    assert "truncated" in refused("parity", good[0], "--trace", path, "--quiet")


def test_a_trace_needs_no_torch_and_holds_what_it_says(good):
    tensors = load_file(good[1])
    assert tensors["run.0.step.0.before"].shape == (16, 2, 2, 4)
    assert tensors["run.0.frames"].dtype == np.uint8
    assert np.array_equal(Trace(good[1]).tensor("run.0.frames"), tensors["run.0.frames"])
