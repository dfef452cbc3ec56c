"""References of weights are renamed, and nothing else is."""

import onnx
import pytest
from pyrexport.targets.links import relocated


@pytest.mark.parametrize("name", ["x", "b" * 64, "b" * 300, "вес.bin"])
def test_only_the_location_of_weights_changes(bundle, name):
    """Checked against ONNX's own reading."""
    data = (bundle / "stage0.onnx").read_bytes()
    expected = onnx.ModelProto.FromString(data)
    changed = 0
    for tensor in expected.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value, changed = name, changed + 1
    assert changed > 10
    assert onnx.ModelProto.FromString(relocated(data, {"weights.bin": name})) == expected
    assert relocated(data, {"other.bin": name}) == data


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x3a\x05ab", b"\x3f", b"\xff" * 12])
def test_what_is_no_model_is_an_error(data):
    with pytest.raises(ValueError, match="no ONNX model"):
        relocated(data, {"weights.bin": "x"})
