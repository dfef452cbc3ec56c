"""`inspect`: the paper's cost table, and headers read without torch."""

import json
import math
import subprocess
import sys

import pytest
from pyrexport.runtime.chain.pyramid import Stage
from pyrexport.runtime.model.families.wan import WAN, WanConfig

WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
}
PRINTED = {
    "0-0-50": 12_591.8,
    "20-20-10": 2_820.9,
    "0-0-4": 1_007.3,
    "0-0-2": 503.7,
    "2-2-2": 533.9,
    "2-2-1": 282.1,
    "1-1-1": 267.0,
}
"""TFLOP of the paper's schedules, one decimal more than it prints."""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WAN_1_3B))
    return path


def test_costs_of_wan_1_3b_are_the_papers_to_the_printed_digits(cli, config):
    document = json.loads(cli("inspect", config, "--resolution", "81x448x832", "--json").stdout)
    stages = [(stage["tokens"], round(stage["tflop"], 3)) for stage in document["stages"]]
    assert stages == [(30_576, 251.837), (4_004, 13.502), (546, 1.626)]
    found = {name: schedule["tflop"] for name, schedule in document["schedules"].items()}
    assert {name: round(tflop, 1) for name, tflop in found.items()} == PRINTED
    assert {name: round(tflop) for name, tflop in found.items()} == {
        "0-0-50": 12_592,
        "20-20-10": 2_821,
        "0-0-4": 1_007,
        "0-0-2": 504,
        "2-2-2": 534,
        "2-2-1": 282,
        "1-1-1": 267,
    }
    assert document["schedules"]["20-20-10"]["passes"] == 2
    assert document["parameters"] == 1_418_998_336
    assert "three stages" in document["assumed"]


def test_ppf_costs(make_checkpoint, cli):
    folder = make_checkpoint("--kind", "ppf")
    document = json.loads(cli("inspect", folder, "--json").stdout)
    config = WanConfig.from_json(WAN_1_3B, "test")
    tokens, patches = (32_760, 4_290, 624), ((1, 2, 2), (2, 4, 4), (4, 8, 8))
    stages = [Stage(0, (16, 1, 1, 1), p, (1, 1, n), 0.0, 1.0, ()) for n, p in zip(tokens, patches, strict=True)]
    tflop = [WAN.flops(config, stage, 512) / 1e12 for stage in stages]
    assert [f"{t:.4g}" for t in tflop] == ["283", "14.69", "1.861"]
    assert [s["latent"] for s in document["stages"]] == [[16, 5, 8, 8]] * 3


def test_parameters_and_bytes_are_those_of_the_files(tiny, cli):
    document = json.loads(cli("inspect", tiny, "--json").stdout)
    for name, part in document["components"].items():
        (file,) = (tiny / name).glob("*.safetensors")
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert part["bytes"] == file.stat().st_size - header
        assert part["parameters"] * 4 == part["bytes"]
    assert document["parameters"] == document["components"]["transformer"]["parameters"]


def test_inspect_loads_no_weight_and_imports_no_torch(tiny):
    code = f"""
import sys
from click.testing import CliRunner
from pyrexport.cli import main
result = CliRunner().invoke(main, ["inspect", {str(tiny)!r}, "--json"])
assert result.exit_code == 0, result.output
assert not {{"torch", "diffusers", "safetensors", "onnx"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_people_get_tables(tiny, cli):
    text = cli("inspect", tiny).stdout
    assert "natural levels" in text
    assert "20-20-10" in text


def test_another_resolution(tiny, cli):
    document = json.loads(cli("inspect", tiny, "--resolution", "33x128x64", "--json").stdout)
    assert document["stages"][0]["latent"] == [16, 9, 16, 8]
    assert math.prod(document["stages"][0]["grid"]) == document["stages"][0]["tokens"]


def test_a_plain_folder_is_one_stage_with_diffusers_schedule(make_checkpoint, cli):
    document = json.loads(cli("inspect", make_checkpoint("--kind", "plain"), "--json").stdout)
    assert document["kind"] == "plain"
    assert document["resolution"] == "81x480x832"
    assert len(document["stages"]) == 1
    assert len(document["schedules"]["50"]["levels"][0]) == 50
    assert document["schedules"]["50"]["guidance_scale"] == 5.0
    assert [round(level, 5) for level in document["schedules"]["distilled-2"]["levels"][0]] == [1, 0.83471]


def test_costs_of_helios_are_those_of_what_runs(make_checkpoint, cli):
    """The first chunk's steps may be twice as many, and nothing is evaluated where the velocity is zero."""
    how = ("--resolution", "9x64x128", "--json")
    for preset, name, first, later in (
        ("tiny-helios-distilled", "2-2-2", (4, 4, 4), (2, 2, 2)),
        ("tiny-helios", "20-20-20", (18, 20, 20), (18, 20, 20)),
    ):
        folder = make_checkpoint("--random", preset, "--no-text-encoder", "--no-vae")
        document = json.loads(cli("inspect", folder, *how).stdout)
        costs = [stage["tflop"] for stage in reversed(document["stages"])]
        schedule = document["schedules"][name]
        assert schedule["tflop"] == pytest.approx(sum(n * cost for n, cost in zip(first, costs, strict=True)))
        assert schedule["tflop_later_chunk"] == pytest.approx(sum(n * c for n, c in zip(later, costs, strict=True)))
        bare = json.loads(cli("inspect", folder / "transformer" / "config.json", *how).stdout)
        zeroed = (schedule.get("zeroed_steps", 0), 0, 0)
        levels = schedule.get("first_chunk", schedule["levels"])
        assert [len(own) - none for own, none in zip(levels, zeroed, strict=True)] == [*first]
        assert bare["stages"] == document["stages"]
        assert bare["parameters"] == document["parameters"]
        assert bare["schedules"][name]["tflop"] == pytest.approx(schedule["tflop"])
        assert "Helios" in bare["assumed"]
    large = json.loads(cli("inspect", folder / "transformer", "--resolution", "33x384x640", "--json").stdout)
    assert [stage["tokens"] for stage in large["stages"]] == [8_640, 2_160, 540]
    assert "TFLOP of a later chunk" in cli("inspect", folder, "--resolution", "9x64x128").stdout
    distilled = make_checkpoint("--random", "tiny-helios-distilled", "--no-text-encoder", "--no-vae")
    assert "4-4-4" in cli("inspect", distilled, "--resolution", "9x64x128").stdout
