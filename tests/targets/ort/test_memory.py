"""The memory plan against what ONNX Runtime takes, and the sizes that keep it small."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import Result
from onnx_ir import DataType, Shape, Value
from pyrexport.export.families.wan.transformer import token_chunk
from pyrexport.runtime.model.families.wan import WanConfig
from pyrexport.targets.facts import find_build_target
from pyrexport.targets.ort.dialect import FUSED
from pyrexport.targets.ort.memory import peak_bytes

CHILD = """
import sys
import numpy as np
import pyrexport
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.proof.memory import MemoryWatch
with pyrexport.load(sys.argv[1], threads=2) as pipeline:
    spec = pipeline.bundle.manifest.graphs[stage_key(0)].spec
    inputs = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in spec.inputs}
    with MemoryWatch() as memory:
        pipeline.run(stage_key(0), inputs)
    print(memory.anonymous)
"""


def test_the_plan_is_what_a_run_takes(
    make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    """13,104 tokens of a narrow model, in a process of its own: within the promised 15 %."""
    options = ("--random", "wan2.1-1.3b", "--blocks", "1", "--width", "256", "--resolution", "33x448x832")
    checkpoint = make_checkpoint(*options, "--kind", "plain", "--no-text-encoder", "--no-vae")
    planned = cli("build", checkpoint, "--target", "ort", "--plan", "--json", "--quiet")
    assert planned.exit_code == 0, planned.output
    expected = json.loads(planned.output)["resolutions"]["33x448x832"]["peak_anonymous_bytes"]
    out = tmp_path / "bundle"
    assert cli("build", checkpoint, "--target", "ort", "-o", out, "--quiet").exit_code == 0
    assert json.loads(cli("inspect", out, "--json").output)["peak_anonymous_bytes"] == expected
    found = subprocess.run([sys.executable, "-c", CHILD, str(out)], check=True, capture_output=True, text=True)
    assert int(found.stdout) == pytest.approx(expected["stage0"], rel=0.15)


def test_a_plan_writes_nothing(
    make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    """And names every graph, with what the process itself takes on top."""
    tiny = make_checkpoint("--kind", "plain", "--resolution", "17x64x64")
    result = cli("build", tiny, "--target", "ort", "--plan", "--json", "--quiet")
    peaks = json.loads(result.output)["resolutions"]["17x64x64"]["peak_anonymous_bytes"]
    assert set(peaks) == {"stage0", "text_64", "vae_first", "vae_next", "sample"}
    assert min(peaks.values()) > find_build_target("ort").process_bytes
    assert cli("build", tiny, "--target", "ort").exit_code == 2
    assert cli("build", tiny, "--target", "ort", "--plan", "-o", tmp_path / "out").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_buffers_are_handed_on_within_a_chain() -> None:
    """Six unary nodes in a row need two buffers beside the input, however long the chain."""
    x = Value(name="x", shape=Shape([1000]), type=ir.TensorType(DataType.FLOAT))
    nodes, last = [], x
    for index in range(6):
        node = ir.Node("", "Gelu", [last], name=f"n{index}")
        last = node.outputs[0]
        last.shape, last.type, last.name = Shape([1000]), ir.TensorType(DataType.FLOAT), f"y{index}"
        nodes.append(node)
    graph = ir.Graph([x], [last], nodes=nodes, opset_imports={"": 23})
    assert peak_bytes(ir.Model(graph, ir_version=10)) == 3 * 4000


def test_the_feed_forward_goes_in_equal_parts() -> None:
    """At Wan2.1-1.3B's and 14B's sizes: parts of one size, whose hidden activation stays below the bound."""
    bound = FUSED.feed_forward_bytes
    for ffn in (8960, 13824):
        config = WanConfig(num_attention_heads=12, ffn_dim=ffn)
        for tokens in (30576, 4004, 546, 32760, 75600):
            rows = token_chunk(tokens, config, FUSED)
            assert tokens % rows == 0
            assert rows * ffn * 4 <= bound
    assert token_chunk(32749, config, FUSED) == -(-32749 // 27)  # a prime: the last part is smaller
