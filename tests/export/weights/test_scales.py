"""Weights in 8-bit floats: a scale that is missing or too many is an error, and products are exact."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from pyrexport.export.weights.edits import read_rows, read_tensor
from pyrexport.runtime.errors import UsageError
from safetensors.torch import load_file, save_file
from support.building import LEAN, small_checkpoint
from support.scales import Tensors, write_scaled

Make = Callable[..., Path]
Run = Callable[..., Result]
LAYER = "blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"


@pytest.fixture(scope="module")
def lean(make_checkpoint: Make) -> Path:
    """A transformer alone."""
    return make_checkpoint(*LEAN)


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_values_are_the_products(lean: Path, tmp_path: Path, suffix: str, by_row: bool) -> None:
    folder = write_scaled(lean, tmp_path / "checkpoint", suffix, by_row=by_row)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    found = small_checkpoint(folder).transformer
    for name, entry in found.items():
        expected = stored[name].float()
        if stored[name].dtype == torch.float8_e4m3fn:
            scale = stored[f"{name.removesuffix('.weight')}{suffix}"]
            expected = expected * scale.view(-1, *(1,) * (expected.ndim - 1))
        assert torch.equal(read_tensor(entry), expected), name
        if entry.shape:
            assert torch.equal(read_rows(entry, len(expected) - 1, 1).float(), expected[-1:]), name


def test_what_other_engines_need_is_left_out(lean: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        written = torch.frombuffer(bytearray(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        tensors |= {
            "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
            f"{LAYER}.scale_input": torch.ones(1),
            "blocks.0.attn1.to_k.input_scale": torch.ones(1),
            f"{LAYER}.comfy_quant": written,
        }

    folder = write_scaled(lean, tmp_path / "checkpoint", change=add)
    assert small_checkpoint(folder).transformer.keys() == small_checkpoint(lean).transformer.keys()


def remove_scale(tensors: Tensors) -> None:
    """As a careless conversion does."""
    del tensors[f"{LAYER}.scale_weight"]


def empty_scale(tensors: Tensors) -> None:
    """As some files have them."""
    tensors[f"{LAYER}.scale_weight"] = torch.zeros(0)


def unused_scale(tensors: Tensors) -> None:
    """Of a layer that is not there."""
    tensors["blocks.7.attn1.to_q.scale_weight"] = torch.ones(1)


def scale_of_floats(tensors: Tensors) -> None:
    """Of a weight that is none in 8 bits."""
    tensors[WEIGHT] = tensors[WEIGHT].float()


def misshaped_scale(tensors: Tensors) -> None:
    """Neither one number nor one a row."""
    tensors[f"{LAYER}.scale_weight"] = torch.ones(3)


def scaled_twice(tensors: Tensors) -> None:
    """By both names."""
    tensors[f"{LAYER}.weight_scale"] = torch.ones(1)


def another_format(tensors: Tensors) -> None:
    """Of four bits."""
    tensors[f"{LAYER}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove_scale, "without a scale"),
        (empty_scale, "is empty"),
        (unused_scale, "is not used.*there is none"),
        (scale_of_floats, "is not used.*found float32"),
        (misshaped_scale, r"\[3\]: expected one number"),
        (scaled_twice, "scale the same weight"),
        (another_format, "nvfp4"),
    ],
)
def test_refused(lean: Path, tmp_path: Path, change: Callable[[Tensors], None], words: str) -> None:
    folder = write_scaled(lean, tmp_path / "checkpoint", change=change)
    with pytest.raises(UsageError, match=words):
        small_checkpoint(folder)


def test_a_header_of_another_format_is_refused(lean: Path, tmp_path: Path) -> None:
    folder = write_scaled(lean, tmp_path / "checkpoint")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "int8_tensorwise"}}})}
    save_file(load_file(file), file, metadata)
    with pytest.raises(UsageError, match="int8_tensorwise"):
        small_checkpoint(folder)


def test_builds_and_passes_parity(lean: Path, tmp_path: Path, cli: Run) -> None:
    folder, out = write_scaled(lean, tmp_path / "checkpoint", by_row=True), tmp_path / "bundle"
    built = cli("build", folder, "--target", "ort", "-o", out, "--quiet", "--resolution", "17x64x64")
    assert built.exit_code == 0, built.output
    proved = cli("parity", out, "--reference", folder, "--quiet")
    assert proved.exit_code == 0, proved.output
