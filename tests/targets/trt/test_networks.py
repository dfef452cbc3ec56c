"""The networks that engines are built from, on ONNX Runtime."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from pyrexport.export.proof.networks import graph_pipeline
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.recipe import read_calibration
from safetensors.torch import load_file
from support.builders import SMALL
from support.building import LEAN, small_checkpoint

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [(("--kind", "ppf", "--stages", "2", *LEAN), "fp16"), (("--kind", "plain", *LEAN), "fp32")],
    ids=["ppf-fp16", "plain-fp32"],
)
def test_graph_parity(make_engines, make_checkpoint, cli, arguments, precision):
    """Within the tolerance of the precision (see `runtime.quantisation.SCHEMES`); bf16 below, pyramidal fp32 above."""
    bundle = make_engines(*arguments, precision=precision)
    reference = make_checkpoint(*arguments)
    result = cli("parity", bundle, "--reference", reference, "--graph", "--quiet", "--json", "--no-decode")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["levels"]["stages"]["relative_l2"] < {"fp32": 1e-5, "fp16": 3e-3}[precision]


@pytest.mark.parametrize(("scheme", "error"), [("w8a8", 2e-2), ("fp8", 4e-2)])
def test_graph_parity_of_integers(make_engines, make_checkpoint, lean_recipe, cli, refused, tmp_path, scheme, error):
    """About three times what is seen of random weights; the recipe is asked for, and no other one taken."""
    bundle = make_engines(*LEAN, precision="bf16", quantize=scheme, recipe=str(lean_recipe))
    facts = open_bundle(bundle).manifest.entries["stage0"].facts
    assert facts["rounded_products"] == 20
    assert facts["fused_attention"] == facts["attention"] == 4
    how = ("parity", bundle, "--reference", make_checkpoint(*LEAN), "--graph", "--quiet", "--json", "--no-decode")
    result = cli(*how, "--recipe", lean_recipe)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["levels"]["stages"]["relative_l2"] < error
    assert "give it with --recipe" in refused(*how)
    changed = tmp_path / "other.safetensors"
    replace(read_calibration(lean_recipe), target_psnr=30.0).to_file(changed)
    assert "is not the recipe that the bundle was built by" in refused(*how, "--recipe", changed)


def test_a_network_over_the_limit_becomes_engines_in_turn(make_engines, make_checkpoint, lean_recipe, cli):
    """Together they are what one engine is: each product, attention and weight once, rounded where it was."""
    options = {"precision": "bf16", "quantize": "w8a8", "recipe": str(lean_recipe)}
    bundle = make_engines(*LEAN, **options, engine_limit="100000")
    whole = open_bundle(make_engines(*LEAN, **options)).manifest.entries
    manifest = open_bundle(bundle).manifest
    count = manifest.entries["stage0"].facts["engines"]
    assert count > 2
    for name, entry in manifest.entries.items():
        for fact in ("network", "attention", "fused_attention", "products", "rounded_products"):
            assert entry.facts[fact] == whole[name].facts[fact]
        assert entry.facts["weights_bytes"] < 1.1 * whole[name].facts["weights_bytes"]
    files = {"stages.engine", *(f"stages-{index}.engine" for index in range(2, count + 1))}
    assert manifest.files.keys() == {path.name for path in bundle.iterdir()} - {"manifest.json"} == files
    how = ("build", make_checkpoint(*LEAN), "--target", "trt", "--compute-capability", "8.9", "--resolution", SMALL)
    given = (word for name, value in options.items() for word in (f"--{name}", value))
    planned = cli(*how, *given, "--engine-limit", "100000", "--plan", "--json", "--quiet")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["files"].keys() == files
    assert max(json.loads(planned.stdout)["files"].values()) <= 100_000


def test_graph_parity_of_blocks_of_4_bits(make_engines, make_checkpoint, cli):
    """A step is a seventh of a block's largest value: 7 % a matrix."""
    arguments = ("--kind", "plain", *LEAN)
    bundle, reference = make_engines(*arguments, precision="fp16", quantize="w4a16"), make_checkpoint(*arguments)
    how = ("--reference", reference, "--graph", "--quiet", "--json", "--no-decode")
    result = cli("parity", bundle, *how)
    assert result.exit_code == 0, result.output
    assert 1e-2 < json.loads(result.stdout)["levels"]["stages"]["relative_l2"] < 1.2e-1


def test_graph_parity_is_kept_and_shown(make_engines, make_checkpoint, cli, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(make_engines(*LEAN, precision="bf16"), bundle)
    assert "engine parity not measured" in cli("inspect", bundle).stdout
    how = ("--reference", make_checkpoint(*LEAN), "--graph", "--quiet", "--store", "--no-decode")
    result = cli("parity", bundle, *how)
    assert result.exit_code == 0, result.output
    shown = " ".join(cli("inspect", bundle).stdout.split())
    assert "graph parity passed, engine parity not measured on a device" in shown
    assert "attention fused" in shown


def test_graph_parity_asks_for_the_checkpoint_of_the_bundle(
    make_engines, engines, bundle, tiny, make_checkpoint, cli, refused
):
    other = make_checkpoint(*LEAN, "--seed", "7")
    result = cli(
        "parity", make_engines(*LEAN, precision="bf16"), "--reference", other, "--graph", "--quiet", "--no-decode"
    )
    assert result.exit_code == 1
    assert "made again, is not the one" in result.stderr
    assert "leave out --graph" in refused("parity", bundle, "--reference", tiny, "--graph", "--quiet", "--no-decode")
    assert "--graph needs" in refused("parity", engines, "--trace", "x", "--graph")


def test_rounding_of_weights_is_reproduced(make_engines, make_checkpoint, tmp_path):
    """The widened network of bf16 weights against float32 arithmetic on PyTorch's own rounding of one matrix."""
    bundle = open_bundle(make_engines(*LEAN, precision="bf16"))
    folder = tmp_path / "networks"
    folder.mkdir()
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    graph_pipeline(bundle, checkpoint, folder, EngineOptions()).close()
    model = onnx.load(str(folder / "stage2.onnx"))
    short = {"blocks.0.attn1.to_q.weight"}
    for tensor in model.graph.initializer:
        if tensor.name in short:
            assert tensor.data_type == onnx.TensorProto.BFLOAT16
            words = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            entry = checkpoint.transformer["blocks.0.attn1.to_q.weight"]
            wanted = load_file(entry.file)[entry.name].to(torch.bfloat16).float().T
            np.testing.assert_array_equal(words.view(np.float32).reshape(wanted.shape), wanted.numpy())
            short.clear()
    assert not short
    kinds = {node.op_type for node in model.graph.node}
    assert "Attention" not in kinds
    assert not any(kind.startswith("Scatter") for kind in kinds)
