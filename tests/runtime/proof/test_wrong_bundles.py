"""Parity fails, at the right level, where one thing is wrong."""

import json

import numpy as np
import pytest
import torch
from pyrexport.export.families.wan.transformer import RotaryTables
from pyrexport.runtime.bundle.graphs import decoder_key
from pyrexport.runtime.chain import resample
from pyrexport.runtime.pipeline.graphs import OpenGraphs
from support.builders import resign
from support.building import LEAN
from support.parity import OBLONG, Change, change_weight, parity


def to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


WRONG_WEIGHTS: dict[str, tuple[list[str], Change]] = {
    "a sign in one block": (["blocks.1.ffn_out.weight"], lambda w: [-w[0]]),
    "weights of two blocks exchanged": (
        ["blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight"],
        lambda w: w[::-1],
    ),
    "the first-frame vector dropped": (["first_frame_embedding"], lambda w: [0 * w[0]]),
    "one layer rounded to bf16": (["blocks.0.attn1.to_v.weight"], lambda w: [to_bf16(w[0])]),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_wrong_weight_fails_at_the_stages(good, copy, wrong):
    change_weight(copy, *WRONG_WEIGHTS[wrong])
    levels = parity(copy, good[1])["levels"]
    assert not levels["stages"]["passed"]
    assert not levels["chain"]["teacher_forced"]["relative_l2"] <= 1e-5
    assert levels["text"]["passed"]
    assert levels["vae"]["passed"]


def test_a_latent_mean_that_is_not_applied_fails_at_the_vae(good, copy):
    latents = json.loads((copy / "manifest.json").read_text())["latents"]
    resign(copy, latents=latents | {"mean": [0.0] * 16})
    levels = parity(copy, good[1])["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["vae", "video"]


def test_taps_scaled_by_a_tenth_fail_at_the_chain(good, monkeypatch):
    real = resample.synthesise
    monkeypatch.setattr(
        resample, "synthesise", lambda bands, taps, axes: real(bands, tuple(1.1 * tap for tap in taps), axes)
    )
    levels = parity(*good)["levels"]
    assert not levels["chain"]["passed"]
    assert levels["stages"]["passed"]


def test_taps_scaled_in_the_manifest_are_refused_when_it_is_opened(copy, good, refused):
    model = json.loads((copy / "manifest.json").read_text())["model"]
    resign(copy, model=model | {"wavelet": [1.1 * 0.5**0.5] * 2})
    assert "low-pass taps are not orthonormal" in refused("parity", copy, "--trace", good[1], "--quiet")


def test_a_cache_that_is_not_advanced_fails_at_the_vae(good, monkeypatch):
    real = OpenGraphs.run

    def stuck(self, key, inputs):
        outputs = real(self, key, inputs)
        if key == decoder_key("vae", first=False):
            outputs |= {f"new_{name}": value for name, value in inputs.items() if name.startswith("cache_")}
        return outputs

    monkeypatch.setattr(OpenGraphs, "run", stuck)
    levels = parity(*good)["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["vae", "video"]


def test_rope_axes_exchanged_fail_at_the_stages(record, make_checkpoint, cli, tmp_path, monkeypatch):
    real = RotaryTables._tokens

    def exchanged(self, name, grid, zero):
        t, h, w = grid
        table = real(self, name, grid, zero).reshape(t, h, w, -1)
        size = table.shape[-1] // 3  # height and width have a third of the pairs each, rounded down
        height, width = table[..., -2 * size : -size], table[..., -size:]
        return torch.cat((table[..., : -2 * size], width, height), dim=-1).reshape(t * h * w, -1)

    monkeypatch.setattr(RotaryTables, "_tokens", exchanged)
    arguments = (*OBLONG, *LEAN)
    assert cli("build", make_checkpoint(*arguments), "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    levels = parity(tmp_path / "b", record(*arguments))["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["stages", "chain"]


def test_the_command_fails_names_the_level_and_the_block(copy, oblong, cli):
    change_weight(copy, *WRONG_WEIGHTS["a sign in one block"])
    arguments = ["--reference", oblong, "--bisect", "--json", "--quiet", "--no-decode"]
    result = cli("parity", copy, *arguments)
    assert result.exit_code == 1
    assert "stages" in result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert document["bisect"]["first"] == "block 1"
    assert document["bisect"]["layer"] == "blocks.1.ffn.net.2"
    assert document["bisect"]["relative_l2"]["block 0"] < 1e-5
