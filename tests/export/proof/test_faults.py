"""Faults that no hash can notice, planted in a quantised bundle: parity fails and names the stage and the layer."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build
from pyrexport.export.weights.calibrated import Columns
from pyrexport.runtime.ranges import Floats, integer_range
from pyrexport.runtime.recipe import read_calibration
from support.building import LEAN
from support.parity import change_weight, parity

LAYER = "blocks.1.attn1.to_out.0"
"""A layer whose input differs between stages."""


def edited(recipe: Path, out: Path, change: Callable[[Floats, Floats], tuple[Floats, Floats]]) -> Path:
    """A recipe in which scale and zero of `LAYER` were changed, signed again."""
    found = read_calibration(recipe)
    own = found.choices[LAYER]
    scale, zero = change(own.tensors["scale"], own.tensors["zero"])
    changed = replace(own, tensors={**own.tensors, "scale": scale, "zero": zero})
    replace(found, choices={**found.choices, LAYER: changed}).to_file(out)
    return out


@pytest.fixture
def static(make_checkpoint, lean_recipe, tmp_path) -> Callable[..., Path]:
    """Builds a bundle with static scales by the recipe, or by one that was changed."""

    def make(change: Callable[..., Any] | None = None, given: Path = lean_recipe) -> Path:
        given = given if change is None else edited(given, tmp_path / "edited.safetensors", change)
        options = ("--quantize", "w8a8", "--recipe", str(given), "--resolution", "17x64x64")
        build(make_checkpoint(*LEAN), tmp_path / "bundle", *options)
        return tmp_path / "bundle"

    return make


@pytest.fixture
def faultless(make_bundle, lean_recipe) -> Path:
    """By the recipe as it is. Not to be changed: copy it."""
    return make_bundle(*LEAN, quantize="w8a8", recipe=str(lean_recipe))


@pytest.fixture
def bisected(make_checkpoint, cli) -> Callable[[Path], tuple[int, dict[str, Any], str]]:
    """Exit code, document and last line of parity with `--bisect`."""

    def run(bundle: Path) -> tuple[int, dict[str, Any], str]:
        arguments = ("--reference", make_checkpoint(*LEAN), "--bisect", "--json", "--quiet")
        result = cli("parity", bundle, *arguments)
        return result.exit_code, json.loads(result.stdout), result.stderr

    return run


def test_a_bundle_without_faults_passes_and_its_ranges_are_those_of_the_recipe(
    faultless, make_checkpoint, cli, tmp_path
):
    """A zero is a whole number, so the interval of the integers is moved by half of one of 255 steps at most."""
    bundle, trace = faultless, tmp_path / "trace.safetensors"
    result = cli("parity", bundle, "--reference", make_checkpoint(*LEAN), "--record", trace, "--json", "--quiet")
    document = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert "bisect" not in document
    level = document["levels"]["ranges"]
    assert 0 < level["relative_error"] <= 0.5 / 255 * (1 + 1e-3) < level["tolerance"]
    assert level["passed"]
    assert set(level["worst"]) == {"stage", "layer"}
    assert "ranges" not in parity(bundle, trace)["levels"]


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_scale_that_is_off_by_two_is_named(static, bisected, factor):
    """In one stage of three; the scale that is too large cuts nothing, and moves no output out of tolerance."""

    def change(scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        return scale * np.float32([1, factor, 1]), zero

    code, document, line = bisected(static(change))
    assert code == 1
    assert (document["bisect"]["stage"], document["bisect"]["layer"]) == (1, LAYER)
    assert f"ranges (stage 1, {LAYER})" in line
    assert document["levels"]["ranges"]["relative_error"] == pytest.approx(abs(factor - 1), rel=0.7)


def test_scales_of_two_stages_exchanged_are_named(static, bisected):
    def change(scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        return scale[[2, 1, 0]], zero[[2, 1, 0]]

    code, document, line = bisected(static(change))
    assert code == 1
    assert document["bisect"]["stage"] in (0, 2)
    assert document["bisect"]["layer"] == LAYER
    assert LAYER in line


@pytest.mark.parametrize("layer", ["attn1.to_v", "ffn_in"])
def test_scales_of_weights_that_are_off_by_two_are_named(faultless, bisected, layer, tmp_path):
    bundle = Path(shutil.copytree(faultless, tmp_path / "bundle"))
    change_weight(bundle, [f"blocks.1.{layer}.scales"], lambda w: [2 * w[0]])
    code, document, line = bisected(bundle)
    assert code == 1
    assert document["levels"]["ranges"]["passed"]
    assert "stages" in line
    found = document["bisect"]
    assert found["stage"] == document["levels"]["stages"]["worst_stage"]
    assert (found["first"], found["layer"]) == (
        "block 1",
        {"ffn_in": "blocks.1.ffn.net.0.proj"}.get(layer, f"blocks.1.{layer}"),
    )


def test_a_migration_that_is_applied_twice_is_named(static, bisected, monkeypatch, lean_recipe, tmp_path):
    """The weight's columns are multiplied once more than the input is divided."""
    once = Columns.apply

    def twice(self: Columns, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        return (
            once(self, *once(self, rows, start), start)
            if self.by.name.startswith("blocks.1.ffn")
            else once(self, rows, start)
        )

    monkeypatch.setattr(Columns, "apply", twice)
    layer = "blocks.1.ffn.net.0.proj"
    found = read_calibration(lean_recipe)
    vector = np.geomspace(0.25, 4, found.of(layer).width).astype(np.float32)
    scale, zero = integer_range(found.of(layer).interval(vector))
    moved = replace(found.choices[layer], tensors={"scale": scale, "zero": zero, "migration": vector})
    replace(found, choices={**found.choices, layer: moved}).to_file(tmp_path / "moved.safetensors")
    code, document, line = bisected(static(given=tmp_path / "moved.safetensors"))
    assert code == 1
    assert "stages" in line
    assert (document["bisect"]["first"], document["bisect"]["layer"]) == ("block 1", layer)
