"""What a build writes."""

import json
from itertools import pairwise

import onnx_ir as ir
import pytest


def test_a_bundle_holds_what_its_manifest_lists(bundle, tiny):
    document = json.loads((bundle / "manifest.json").read_text())
    assert {path.name for path in bundle.iterdir()} == {*document["files"], "manifest.json"}
    assert set(document["graphs"]) == {"stage0", "stage1", "stage2", "text_64", "vae_first", "vae_next"}
    assert document["model"]["schedules"].keys() == json.loads((tiny / "pyramid.json").read_text())["schedules"].keys()
    assert document["target"] == "ort"
    assert document["target_options"] == {"kernel": "avx2", "provider": "cpu", "provider_untested": False}
    assert document["precision"] == {
        "transformer": "fp32",
        "text_encoder": "fp32",
        "vae": "fp32",
        "tiny_decoder": "fp32",
        "compute": "fp32",
    }
    assert document["resolutions"] == ["17x64x64"]
    assert document["decoders"]["vae"].pop("config")["z_dim"] == 16
    frames = {"17x64x64": {"tile": [8, 8], "tiles": 1, "overhead": 1.0}}
    assert document["decoders"] == {"vae": {"frames": frames, "caches": "float32", "packed": False}}


def test_graphs_hold_no_weights_no_scatter_and_no_transposed_weight(bundle):
    for file in bundle.glob("*.onnx"):
        model = ir.load(file)
        kinds = {node.op_type for node in model.graph}
        assert not {"ScatterND", "GatherND", "SplitToSequence", "If", "Loop"} & kinds, file.name
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                assert value.const_value.location == "weights.bin"
                assert "Transpose" not in {use.node.op_type for use in value.uses()}, (file.name, name)
            else:
                assert value.const_value.nbytes <= 16 * 1024, (file.name, name)
        if file.name.startswith("stage"):
            names = [node.op_type for node in model.graph]
            assert names.count("MultiHeadAttention") == 4  # two blocks, self and cross
            assert names.count("RotaryEmbedding") == 4


def test_every_weight_is_stored_once(bundle):
    places = {}
    for file in bundle.glob("*.onnx"):
        for value in ir.load(file).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                places[value.const_value.offset] = value.const_value.length
    ends = [(offset, offset + length) for offset, length in sorted(places.items())]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    document = json.loads((bundle / "manifest.json").read_text())
    table = document["text"]["table"]
    assert sum(places.values()) + 4 * table["rows"] * table["width"] == document["weights"]["bytes"]


@pytest.mark.usefixtures("exports_each_time")
def test_building_twice_gives_the_same_bytes(make_checkpoint, cli, tmp_path):
    folder = make_checkpoint("--no-vae", "--blocks", "1", "--stages", "2")
    for name in ("a", "b"):
        assert cli("build", folder, "--target", "ort", "-o", tmp_path / name, "--quiet").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "manifest.json",
        "stage0.onnx",
        "stage1.onnx",
        "text_64.onnx",
        "tokenizer.json",
        "weights.bin",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
