"""Bundles for a Snapdragon: built and run in the emulation, and broken ones."""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxscript import opset23
from pyrexport.targets import plugins
from pyrexport.targets.qnn.dialect import Hexagon
from safetensors.numpy import load_file, save_file
from support.builders import resign

pytest.importorskip("onnxruntime_qnn")

PROOF = ("--schedule", "1-1", "--quiet")
ROUNDED = torch.ops.pyrexport.rounded_input16.default


def test_it_holds_a_context_of_each_stage_for_each_chip(bundle):
    contexts = {f"stage{i}.{chip}.{end}" for i in (0, 1) for chip in ("sm8650", "sm8750") for end in ("onnx", "bin")}
    others = {"manifest.json", "tokenizer.json", "text_64.onnx", "weights.bin"}
    assert {path.name for path in bundle.iterdir()} == contexts | others


@pytest.mark.parametrize("chip", ["", "8 Elite"])
def test_it_computes_what_the_checkpoint_does(bundle, tiny, cli, chip, said):
    """Stages in 11 bits throughout: 2.4e-3. In float32, which the emulation falls back to without a chip: 1e-7."""
    own = ("--chip", chip) if chip else ()
    result = cli("parity", bundle, "--reference", tiny, "--json", *own, *PROOF)
    assert result.exit_code == 0, result.output
    assert set(said) == {"sm8750" if chip else "sm8650"}
    levels = json.loads(result.stdout)["levels"]
    assert 5e-4 < levels["stages"]["relative_l2"] <= 5e-3
    assert levels["text"]["relative_l2"] <= 1e-5


@pytest.fixture
def prove_integers(tiny, recipe, cli, tmp_path):
    """Build in integers by a recipe, and run parity."""

    def prove(recipe=recipe):
        out = tmp_path / "bundle"
        how = ("--soc", "sm8750", "--quantize", "w8a16", "--recipe", recipe, "--quiet")
        result = cli("build", tiny, "--target", "qnn", "-o", out, *how)
        assert result.exit_code == 0, result.output
        return cli("parity", out, "--reference", tiny, "--json", "--prompt", "a cat", *PROOF)

    return prove


def test_integers_of_16_bits(prove_integers):
    """By a recipe of integers of 8 bits. Weights are rounded to 8 bits: 1 % a layer, and fewer bytes."""
    proved = prove_integers()
    assert proved.exit_code == 0, proved.output
    assert 5e-3 < json.loads(proved.stdout)["levels"]["stages"]["relative_l2"] <= 5e-2


def test_scales_of_inputs_that_are_off_by_2_are_found(prove_integers, monkeypatch):
    """Integers are made by scales twice those that they are read by. Queries and keys, normed afterwards, hide it."""
    real = Hexagon.operators[ROUNDED]

    def translated(x: Any, scale: Any, zero: Any) -> Any:
        return real(opset23.Div(x, opset23.Constant(value_float=2.0)), scale, zero)

    monkeypatch.setitem(Hexagon.operators, ROUNDED, translated)
    found = prove_integers()
    assert found.exit_code == 1
    assert "parity failed: stages" in found.stderr


def test_a_weight_that_is_off_by_2_is_found(bundle, tiny, cli, tmp_path):
    other = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.2.weight"] *= np.float32(2)
    save_file(tensors, file, metadata={"format": "pt"})
    result = cli("parity", bundle, "--reference", other, *PROOF)
    assert result.exit_code == 1
    assert "parity failed: stages, chain out of tolerance" in result.stderr


def test_weights_that_are_shared_are_opened_by_a_chip_alone(make, tiny, cli, refused):
    """The emulation would end the process; the networks, compiled one by one, run in it. Parts share theirs too."""
    shared = make("--soc", "sm8750", "--share-weights", "--context-limit", "150000")
    assert {path.name for path in shared.glob("*.bin")} == {"stages.sm8750.bin", "stages-2.sm8750.bin", "weights.bin"}
    assert "build it without --share-weights" in refused("parity", shared, "--reference", tiny, *PROOF)
    result = cli("parity", shared, "--reference", tiny, "--graph", *PROOF)
    assert result.exit_code == 0, result.output


def test_chips_are_listed(cli):
    result = cli("build", "nothing", "--target", "qnn", "--soc", "list")
    assert result.exit_code == 0, result.output
    assert "Snapdragon 8 Elite" in result.stdout


def test_measurements_of_the_emulation_say_so(bundle, cli):
    result = cli("bench", bundle, "--runs", "1", "--schedule", "1-1", "--quiet")
    assert result.exit_code == 0, result.output
    assert "emulated here: times mean nothing" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "needs a chip to compile for: give --soc, one of sm8450 (Snapdragon 8 Gen 1)"),
        (("--soc", "sm8650,exynos"), "unknown chip 'exynos': expected one of sm8450"),
        (("--soc", "sm8750", "--precision", "fp32"), "takes the transformer in fp16"),
        (("--soc", "sm8750", "--precision", "text_encoder=fp16"), "takes the text_encoder in fp32 or bf16"),
    ],
)
def test_what_cannot_be_built(tiny, refused, tmp_path, options, message):
    assert message in refused("build", tiny, "--target", "qnn", "-o", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_compiler_refuses(tiny, cli, monkeypatch, tmp_path):
    """A contrib operator would be left to the CPU."""
    from pyrexport.targets.ort.dialect import FUSED
    from pyrexport.targets.qnn.target import Qnn

    monkeypatch.setattr(Qnn, "dialect", lambda self: FUSED)
    result = cli("build", tiny, "--target", "qnn", "--soc", "sm8750", "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "stage0 cannot be compiled for sm8750 (Snapdragon 8 Elite)" in result.stderr
    assert "fallback to CPU EP has been explicitly disabled" in result.stderr
    assert not (tmp_path / "out").exists()


def _truncate(folder: Path) -> None:
    file = folder / "stage1.sm8650.bin"
    file.write_bytes(file.read_bytes()[:1000])


def _exchange(folder: Path) -> None:
    one, other = ((folder / f"stage{i}.sm8650.bin").read_bytes() for i in (0, 1))
    graphs = [(folder / f"stage{i}.sm8650.onnx").read_bytes() for i in (0, 1)]
    for i, data in ((0, other), (1, one)):
        (folder / f"stage{i}.sm8650.bin").write_bytes(data)
        (folder / f"stage{i}.sm8650.onnx").write_bytes(graphs[1 - i].replace(b"stage%d." % (1 - i), b"stage%d." % i))


def _another_chip(folder: Path) -> None:
    for i in (0, 1):
        (folder / f"stage{i}.sm8650.bin").write_bytes((folder / f"stage{i}.sm8750.bin").read_bytes())
        graph = (folder / f"stage{i}.sm8750.onnx").read_bytes()
        (folder / f"stage{i}.sm8650.onnx").write_bytes(graph.replace(b".sm8750.", b".sm8650."))


def _another_wrapper(folder: Path) -> None:
    """The file that a session opens, alone."""
    for i in (0, 1):
        graph = (folder / f"stage{i}.sm8750.onnx").read_bytes()
        (folder / f"stage{i}.sm8650.onnx").write_bytes(graph.replace(b".sm8750.", b".sm8650."))


def _beyond_the_head(folder: Path) -> None:
    file = folder / "stage1.sm8650.bin"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is not the context of stage1 for sm8650"),
        (_exchange, "is not the context of stage0 for sm8650"),
        (_another_chip, "is not the context of stage0 for sm8650"),
        (_another_wrapper, "was not compiled for sm8650: expected architecture 75 and chip 57, found 79 and 69"),
        (_beyond_the_head, "cannot load stage1.sm8650.onnx"),
    ],
)
def test_contexts_that_are_not_the_manifest_s(copy, tiny, cli, refused, damage, message):
    damage(copy)
    found = cli("parity", copy, "--reference", tiny, *PROOF)
    assert found.exit_code == 1
    assert "fetch the bundle again" in found.stderr
    resign(copy)
    assert message in refused("parity", copy, "--reference", tiny, *PROOF)


def test_another_version_of_the_wheel(copy, tiny, refused):
    resign(copy, engine={"name": "onnxruntime-qnn", "version": "99.0"})
    assert "built for onnxruntime-qnn 99.0" in refused("parity", copy, "--reference", tiny, *PROOF)


def test_no_wheel(tiny, bundle, refused, tmp_path, monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(plugins, "version", missing)
    line = refused("build", tiny, "--target", "qnn", "--soc", "sm8750", "-o", tmp_path / "out")
    assert "needs onnxruntime-qnn: pip install 'pyrexport[qnn]'" in line


def test_a_chip_that_was_not_built_for(bundle, tiny, refused):
    line = refused("parity", bundle, "--reference", tiny, "--chip", "sm8850", *PROOF)
    assert "was not compiled for 'sm8850': expected one of sm8650, sm8750" in line
