"""Integers in a bundle: what is stored, what is computed, what it costs, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import Ranges, integer_range
from pyrexport.targets.ort.target import KERNELS

LEAN = ("--no-text-encoder", "--no-vae")


def layers(bundle: Path, stage: int = 0) -> onnx.ModelProto:
    return onnx.load(str(bundle / f"stage{stage}.onnx"), load_external_data=False)


@pytest.mark.parametrize(
    ("method", "operator", "kind"),
    [
        ("w8", "MatMulNBits", onnx.TensorProto.UINT8),
        ("w4", "MatMulNBits", onnx.TensorProto.UINT8),
        ("w8a8-dynamic", "MatMulIntegerToFloat", onnx.TensorProto.INT8),
        ("w8a8", "MatMulIntegerToFloat", onnx.TensorProto.INT8),
    ],
)
def test_matrices_of_blocks_are_integers_on_disk_and_in_products(
    make_bundle, make_checkpoint, lean_recipe, cli, method, operator, kind
):
    """Ten of a block; and the parity that its scheme promises, which is not that of float32."""
    given = {"w8a8": {"recipe": str(lean_recipe)}, "w8a8-dynamic": {"kernel": "avx2"}}.get(method, {})
    bundle = make_bundle(*LEAN, quantize=method, **given)
    model = layers(bundle)
    blocks = open_bundle(bundle).manifest.model.transformer.num_layers
    products = [node for node in model.graph.node if node.op_type == operator]
    assert len(products) == 10 * blocks
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {stored[node.input[1]] for node in products} == {kind}
    result = cli("parity", bundle, "--reference", make_checkpoint(*LEAN), "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["levels"]["stages"]["relative_l2"]
    assert SCHEMES["fp32"].tolerances["stages"] * 30 < found < SCHEMES[method].tolerances["stages"]


def test_stages_share_their_integers_and_not_their_ranges(make_bundle, lean_recipe):
    bundle = make_bundle(*LEAN, quantize="w8a8", recipe=str(lean_recipe))
    places = [
        {
            tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "offset")
            for tensor in layers(bundle, stage).graph.initializer
            if tensor.external_data
        }
        for stage in (0, 1)
    ]
    query = "blocks.0.attn1.to_q"
    assert places[0][f"{query}.values"] == places[1][f"{query}.values"]
    assert places[0][f"{query}.scale"] != places[1][f"{query}.scale"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_are_within_what_the_kernels_sums_hold(make_bundle, kernel):
    """AVX2 adds two products of u8 and s8 in 16 bits; VNNI adds four in 32."""
    bundle = make_bundle(*LEAN, quantize="w8a8-dynamic", kernel=kernel)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target_options"]["kernel"] == kernel
    content = (bundle / "weights.bin").read_bytes()
    largest = 0
    for tensor in layers(bundle).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
            values = np.frombuffer(content, np.int8, place["length"], place["offset"]).astype(int)
            largest = max(largest, int(np.abs(values).max()))
    assert largest == KERNELS[kernel]
    assert (2 * 255 * largest <= 2**15 - 1) == (kernel == "avx2")


def test_a_range_holds_zero_and_what_it_was_made_of():
    """By ONNX's own definition of a quantised value; beyond the magnitude values are cut."""
    lowest, highest = (np.float32(ends).reshape(3, 1, 1) for ends in ([-1, 0.5, -4], [2, 4, -1]))
    magnitude, others = np.float32([2, 4, 2]), (np.ones((3, 1), np.float32), np.ones(3, np.float32))
    ranges = Ranges(lowest, highest, others[0], magnitude, *others)
    scale, zero = integer_range(ranges.interval())
    assert scale == pytest.approx([3 / 255, 4 / 255, 2 / 255], rel=1e-6)
    assert zero.tolist() == [85, 0, 255]
    halved, same = integer_range(ranges.interval(np.float32([2])))
    assert np.array_equal(2 * halved, scale)
    assert np.array_equal(same, zero)


def test_what_cannot_be_is_refused(make_checkpoint, tiny, lean_recipe, refused, tmp_path):
    lean = make_checkpoint(*LEAN)
    build = ("build", lean, "--target", "ort", "--resolution", "17x64x64", "-o", tmp_path / "out")
    assert "make a recipe with 'pyrexport calibrate --quantize w8a8'" in refused(*build, "--quantize", "w8a8")
    assert "is for --quantize transformer=w8a8, found w8" in refused(
        *build, "--quantize", "w8", "--recipe", lean_recipe
    )
    assert "has no quantisation 'int3': expected one of w8, w4, w8a8-dynamic, w4a8, w8a8" in refused(
        *build, "--quantize", "int3"
    )
    assert "unknown component 'unet'" in refused(*build, "--quantize", "unet=w8")
    assert "has no text_encoder" in refused(*build, "--quantize", "text_encoder=w8")
    assert "given twice" in refused(*build, "--quantize", "w8", "--quantize", "transformer=w4")
    assert "has no precision 'w8': expected one of fp32, fp16, bf16" in refused(*build, "--precision", "w8")
    whole = ("build", tiny, *build[2:])
    assert "the vae has no quantisation 'w8': expected one of w8a8" in refused(*whole, "--quantize", "vae=w8")
    assert "text_encoder has no quantisation 'w8a8': expected one of" in refused(
        *whole, "--quantize", "text_encoder=w8a8"
    )
    other = make_checkpoint(*LEAN, "--seed", "3")
    assert "is of another checkpoint" in refused(
        "build", other, *build[2:], "--quantize", "w8a8", "--recipe", lean_recipe
    )
    edited = tmp_path / "edited.safetensors"
    data = bytearray(lean_recipe.read_bytes())
    data[-5] ^= 1
    edited.write_bytes(data)
    assert "was changed since it was made" in refused(*build, "--quantize", "w8a8", "--recipe", edited)
    assert not (tmp_path / "out").exists()
