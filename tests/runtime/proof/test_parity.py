"""Parity passes where it must, by what each precision may cost."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pyrexport
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from pyrexport.runtime.proof.metrics import distance
from pyrexport.runtime.quantisation import SCHEMES
from support.builders import resign
from support.building import ONE_STAGE
from support.parity import parity, tampered


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
    result = parity(make_bundle(*arguments), record(*arguments, how=how))
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
    result = parity(make_bundle(*arguments, precision=precision), record(*arguments))
    assert result["passed"], {
        name: level.get("relative_l2", level.get("psnr")) for name, level in result["levels"].items()
    }
    # A pass at the precision's own error, not one of a tolerance that would pass anything.
    assert result["levels"]["stages"]["relative_l2"] > result["levels"]["stages"]["tolerance"] / 30
    assert SCHEMES["fp32"].tolerances["stages"] < result["levels"]["stages"]["relative_l2"]


@pytest.mark.parametrize("method", ["w8", "w4"])
def test_a_quantised_text_encoder_stays_within_its_tolerance(make_bundle, record, method):
    result = parity(make_bundle(*ONE_STAGE, quantize=f"text_encoder={method}"), record(*ONE_STAGE))
    levels = result["levels"]
    assert result["passed"]
    assert levels["text"]["tolerance"] / 30 < levels["text"]["relative_l2"] <= levels["text"]["tolerance"]
    assert levels["stages"]["relative_l2"] <= 1e-5  # nothing else is rounded


def test_the_unchanged_bundle_passes(good):
    result = parity(*good)
    assert result["passed"]
    assert [probe["stage"] for probe in result["levels"]["stages"]["probes"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(result["levels"]["stages"]["probes"][0]["groups"]) == {"first", "rest"}
    assert len(result["levels"]["chain"]["growth"][0]) == 5


def test_every_length_of_the_text_encoder_is_proved(make_checkpoint, cli, refused, tmp_path):
    """Prompts are short: without others, only the shortest graph would ever be compared."""
    checkpoint, bundle, trace = tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "trace.safetensors"
    shutil.copytree(make_checkpoint(*ONE_STAGE), checkpoint)
    description = json.loads((checkpoint / "pyramid.json").read_text())
    (checkpoint / "pyramid.json").write_text(json.dumps(description | {"text_length": 96}))
    assert cli("build", checkpoint, "--target", "ort", "-o", bundle, "--quiet").exit_code == 0
    assert cli("parity", "--record", trace, "--reference", checkpoint, "--quiet").exit_code == 0
    levels = parity(bundle, trace)["levels"]
    assert levels["text"]["passed"]
    line = refused(
        "parity", bundle, "--trace", tampered(trace, tmp_path / "t", lambda d: d.update(texts=[])), "--quiet"
    )
    assert "graph for 96 tokens" in line
    model = ir.load(bundle / "text_96.onnx")
    (output,) = model.graph.outputs
    wrong = ir.node("Neg", [output])
    model.graph.append(wrong)
    wrong.outputs[0].shape, wrong.outputs[0].type = output.shape, output.type
    output.name, wrong.outputs[0].name = "before", output.name
    model.graph.outputs[0] = wrong.outputs[0]
    ir.save(model, bundle / "text_96.onnx")
    resign(bundle)
    levels = parity(bundle, trace)["levels"]
    assert not levels["text"]["passed"]
    assert levels["stages"]["passed"]


def test_plain_wan_equals_diffusers_own_pipeline(make_checkpoint, make_bundle):
    """Same initial latents, guidance and negative prompt, 8 steps of the flow-Euler scheduler."""
    size = ("--resolution", "17x64x64")
    bundle, checkpoint = make_bundle("--kind", "plain", "--no-vae", *size), make_checkpoint("--kind", "plain", *size)
    latents = np.random.default_rng(0).standard_normal((16, 5, 8, 8)).astype(np.float32)
    theirs = WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    expected = theirs(
        "a cat",
        "ugly, blurred",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=8,
        guidance_scale=5.0,
        latents=torch.from_numpy(latents)[None],
        output_type="latent",
        max_sequence_length=64,
    ).frames[0]
    with pyrexport.load(bundle) as ours:
        found = ours(
            "a cat",
            negative_prompt="ugly, blurred",
            schedule="8",
            guidance_scale=5.0,
            latents=latents,
            output_type="latent",
        ).latents
    assert distance(found, expected.numpy()).relative_l2 <= 1e-4
