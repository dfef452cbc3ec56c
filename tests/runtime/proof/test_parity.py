"""Parity passes where it must, and fails, at the right level, where one thing is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pyrexport
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from pyrexport.export import stage_graph
from pyrexport.runtime import parity, pipeline, resample
from pyrexport.runtime.proof.trace import Trace
from safetensors.numpy import load_file, save_file
from support.builders import resign

TEETH_ARGUMENTS = ("--resolution", "17x64x128")
"""Not square, so that height and width can be told apart."""


@pytest.fixture(scope="module")
def record(make_checkpoint, tmp_path_factory):
    """`record(...)`: a trace of a tiny checkpoint, by the command that users call."""
    from click.testing import CliRunner
    from pyrexport.cli import main

    made = {}

    def make(*arguments: str, size: str = "17x64x64", how: tuple[str, ...] = ()) -> Path:
        key = (arguments, size, how)
        if key not in made:
            out = tmp_path_factory.mktemp("trace") / "trace.safetensors"
            checkpoint = make_checkpoint(*arguments)
            command = [
                "parity",
                "--record",
                str(out),
                "--reference",
                str(checkpoint),
                "--prompt",
                "a red circle",
                "--quiet",
                *how,
            ]
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 0, result.output
            made[key] = out
        return made[key]

    return make


def run(bundle: Path, trace: Path) -> dict:
    with pyrexport.load(bundle, resident=True) as opened:
        return parity.check_parity(opened, Trace(trace))


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ((), ()),
        (("--kind", "ppf", "--no-vae"), ()),
        (("--kind", "plain", "--no-vae", "--resolution", "17x64x64"), ("--schedule", "6")),
    ],
)
def test_fp32_parity_of_every_kind(make_bundle, record, arguments, how):
    """Kinds differ in their transformers; one of them is decoded."""
    result = run(make_bundle(*arguments), record(*arguments, how=how))
    levels = result["levels"]
    decoded = set() if "--no-vae" in arguments else {"vae", "video"}
    assert result["passed"]
    assert set(levels) == {"text", "stages", "chain", *decoded}
    assert levels["text"]["relative_l2"] <= 1e-5
    assert levels["stages"]["relative_l2"] <= 1e-5
    assert levels["chain"]["relative_l2"] <= 1e-4
    if decoded:
        assert levels["vae"]["relative_l2"] <= 1e-5
        assert levels["video"]["psnr"] >= 60


@pytest.mark.parametrize(("precision", "arguments"), [("fp16", ("--no-vae",)), ("bf16", ())])
def test_reduced_storage_stays_within_its_tolerance_and_is_not_exact(make_bundle, record, precision, arguments):
    result = run(make_bundle(*arguments, precision=precision), record(*arguments))
    assert result["passed"], {
        name: level.get("relative_l2", level.get("psnr")) for name, level in result["levels"].items()
    }
    # A pass at the precision's own error, not one of a tolerance that would pass anything.
    assert result["levels"]["stages"]["relative_l2"] > result["levels"]["stages"]["tolerance"] / 30
    assert parity.TOLERANCES["fp32"]["stages"] < result["levels"]["stages"]["relative_l2"]


@pytest.mark.parametrize("text_precision", ["int8", "int4"])
def test_a_quantised_text_encoder_stays_within_its_tolerance(make_bundle, record, text_precision):
    result = run(make_bundle("--no-vae", text_precision=text_precision), record("--no-vae"))
    levels = result["levels"]
    assert result["passed"]
    assert levels["text"]["tolerance"] / 30 < levels["text"]["relative_l2"] <= levels["text"]["tolerance"]
    assert levels["stages"]["relative_l2"] <= 1e-5  # nothing else is rounded


@pytest.fixture(scope="module")
def good(make_bundle, make_checkpoint, tmp_path_factory, record):
    """A bundle that is not square, and its trace."""
    from click.testing import CliRunner
    from pyrexport.cli import main

    out = tmp_path_factory.mktemp("good") / "bundle"
    command = ["build", str(make_checkpoint(*TEETH_ARGUMENTS)), "--target", "ort", "-o", str(out), "--quiet"]
    assert CliRunner().invoke(main, command).exit_code == 0
    return out, record(*TEETH_ARGUMENTS)


@pytest.fixture
def copy(good, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(good[0], folder)
    return folder


def change_weight(folder: Path, names: list[str], change) -> None:
    """Change float32 weights of stage graphs in the weights file."""
    initializers = ir.load(folder / "stage0.onnx").graph.initializers
    mapped = []
    for name in names:
        place = initializers[name].const_value
        mapped.append(np.memmap(folder / "weights.bin", np.float32, "r+", place.offset, tuple(place.shape.numpy())))
    values = change([np.array(m) for m in mapped])
    for target, value in zip(mapped, values, strict=True):
        target[...] = value
        target.flush()
    resign(folder)


def to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


WRONG_WEIGHTS = {
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
    levels = run(copy, good[1])["levels"]
    assert not levels["stages"]["passed"]
    assert not levels["chain"]["teacher_forced"]["relative_l2"] <= 1e-5
    assert levels["text"]["passed"]
    assert levels["vae"]["passed"]


def test_the_unchanged_bundle_passes(good):
    result = run(*good)
    assert result["passed"]
    assert [probe["stage"] for probe in result["levels"]["stages"]["probes"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(result["levels"]["stages"]["probes"][0]["groups"]) == {"first", "rest"}
    assert len(result["levels"]["chain"]["growth"][0]) == 5


def test_a_latent_mean_that_is_not_applied_fails_at_the_vae(good, copy):
    latents = json.loads((copy / "manifest.json").read_text())["latents"]
    resign(copy, latents=latents | {"mean": [0.0] * 16})
    levels = run(copy, good[1])["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["vae", "video"]


def test_taps_scaled_by_a_tenth_fail_at_the_chain(good, monkeypatch):
    real = resample.synthesise
    monkeypatch.setattr(
        resample, "synthesise", lambda bands, taps, axes: real(bands, tuple(1.1 * tap for tap in taps), axes)
    )
    levels = run(*good)["levels"]
    assert not levels["chain"]["passed"]
    assert levels["stages"]["passed"]


def test_taps_scaled_in_the_manifest_are_refused_when_it_is_opened(copy, good, refused):
    model = json.loads((copy / "manifest.json").read_text())["model"]
    resign(copy, model=model | {"wavelet": [1.1 * 0.5**0.5] * 2})
    assert "low-pass taps are not orthonormal" in refused("parity", copy, "--trace", good[1], "--quiet")


def test_a_cache_that_is_not_advanced_fails_at_the_vae(good, monkeypatch):
    def stuck(names_of):
        real = pipeline.Pipeline.run

        def run_graph(self, graph, inputs):
            outputs = real(self, graph, inputs)
            if graph == "vae_next":
                outputs |= {f"new_{name}": value for name, value in inputs.items() if name.startswith("cache_")}
            return outputs

        return run_graph

    monkeypatch.setattr(pipeline.Pipeline, "run", stuck(None))
    levels = run(*good)["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["vae", "video"]


def test_rope_axes_exchanged_fail_at_the_stages(record, make_checkpoint, cli, tmp_path, monkeypatch):
    real = stage_graph.RotaryTables._tokens

    def exchanged(self, name, grid, zero):
        t, h, w = grid
        table = real(self, name, grid, zero).reshape(t, h, w, -1)
        size = table.shape[-1] // 3  # height and width have a third of the pairs each, rounded down
        height, width = table[..., -2 * size : -size], table[..., -size:]
        return torch.cat((table[..., : -2 * size], width, height), dim=-1).reshape(t * h * w, -1)

    monkeypatch.setattr(stage_graph.RotaryTables, "_tokens", exchanged)
    arguments = (*TEETH_ARGUMENTS, "--no-vae")
    assert cli("build", make_checkpoint(*arguments), "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    levels = run(tmp_path / "b", record(*arguments))["levels"]
    assert [name for name, level in levels.items() if not level["passed"]] == ["stages", "chain"]


def test_the_command_fails_names_the_level_and_the_block(good, copy, make_checkpoint, cli):
    change_weight(copy, *WRONG_WEIGHTS["a sign in one block"])
    arguments = ["--reference", make_checkpoint(*TEETH_ARGUMENTS), "--bisect", "--json", "--quiet", "--no-decode"]
    result = cli("parity", copy, *arguments)
    assert result.exit_code == 1
    assert "stages" in result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert document["bisect"]["first"] == "block 1"
    assert document["bisect"]["relative_l2"]["block 0"] < 1e-5


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
        (["{bundle}", "--trace", "{other}"], "another model"),
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


def tampered(path: Path, out: Path, describe=None, change=None) -> Path:
    """A trace with its description or its tensors changed."""
    from pyrexport.runtime.model.safetensors import read_metadata

    document = json.loads(read_metadata(path)["trace"])
    tensors = load_file(path)
    if describe:
        describe(document)
    if change:
        change(tensors)
    save_file(tensors, out, metadata={"trace": json.dumps(document)})
    return out


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

    levels = run(good[0], tampered(good[1], tmp_path / "t.safetensors", change=change))["levels"]
    assert not levels["stages"]["passed"]


def test_a_damaged_trace_is_refused(good, refused, tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(good[1].read_bytes()[:-7])
    assert "truncated" in refused("parity", good[0], "--trace", path, "--quiet")


def test_every_length_of_the_text_encoder_is_proved(make_checkpoint, cli, refused, tmp_path):
    """Prompts are short: without others, only the shortest graph would ever be compared."""
    checkpoint, bundle, trace = tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "trace.safetensors"
    shutil.copytree(make_checkpoint("--no-vae", "--blocks", "1"), checkpoint)
    description = json.loads((checkpoint / "pyramid.json").read_text())
    (checkpoint / "pyramid.json").write_text(json.dumps(description | {"text_length": 96}))
    assert cli("build", checkpoint, "--target", "ort", "-o", bundle, "--quiet").exit_code == 0
    assert cli("parity", "--record", trace, "--reference", checkpoint, "--quiet").exit_code == 0
    levels = run(bundle, trace)["levels"]
    assert levels["text"]["passed"]
    line = refused(
        "parity", bundle, "--trace", tampered(trace, tmp_path / "t", lambda d: d.update(texts=[])), "--quiet"
    )
    assert "text_96" in line
    model = ir.load(bundle / "text_96.onnx")
    (output,) = model.graph.outputs
    wrong = ir.node("Neg", [output])
    model.graph.append(wrong)
    wrong.outputs[0].shape, wrong.outputs[0].type = output.shape, output.type
    output.name, wrong.outputs[0].name = "before", output.name
    model.graph.outputs[0] = wrong.outputs[0]
    ir.save(model, bundle / "text_96.onnx")
    resign(bundle)
    levels = run(bundle, trace)["levels"]
    assert not levels["text"]["passed"]
    assert levels["stages"]["passed"]


def test_metrics_against_numpy_and_by_hand():
    x = np.arange(1.0, 7.0).reshape(2, 3)
    found = parity.distance(x * 1.01, x)
    assert found.relative_l2 == pytest.approx(0.01)
    assert found.max_abs == pytest.approx(0.06)
    assert found.cosine == pytest.approx(1)
    assert parity.distance(-x, x).cosine == pytest.approx(-1)
    assert parity.distance(x * np.nan, x).relative_l2 == np.inf
    frames = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    assert parity.psnr(frames, frames) == 100
    assert parity.psnr(np.zeros_like(frames), np.ones_like(frames)) == pytest.approx(20 * np.log10(255))
    assert parity.ssim(frames, frames) == pytest.approx(1)
    assert parity.ssim(255 - frames, frames) < 0


def test_plain_wan_equals_diffusers_own_pipeline(make_checkpoint, make_bundle):
    """Same initial latents, guidance and negative prompt, 8 steps of the flow-Euler scheduler."""
    arguments = ("--kind", "plain", "--resolution", "17x64x64")
    bundle, checkpoint = make_bundle(*arguments), make_checkpoint(*arguments)
    latents = np.random.default_rng(0).standard_normal((16, 5, 8, 8)).astype(np.float32)
    theirs = WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    expected = theirs(
        "a cat", "ugly, blurred", height=64, width=64, num_frames=17, num_inference_steps=8, guidance_scale=5.0,
        latents=torch.from_numpy(latents)[None], output_type="latent", max_sequence_length=64,
    ).frames[0]  # fmt: skip
    with pyrexport.load(bundle) as ours:
        found = ours(
            "a cat",
            negative_prompt="ugly, blurred",
            schedule="8",
            guidance_scale=5.0,
            latents=latents,
            output_type="latent",
        ).latents
    assert parity.distance(found, expected.numpy()).relative_l2 <= 1e-4


def test_a_trace_needs_no_torch_and_holds_what_it_says(good):
    tensors = load_file(good[1])
    assert tensors["run.0.step.0.before"].shape == (16, 2, 2, 4)
    assert tensors["run.0.frames"].dtype == np.uint8
    assert np.array_equal(Trace(good[1]).tensor("run.0.frames"), tensors["run.0.frames"])
