"""What the log of a build says of an engine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pyrexport.runtime.bundle.graphs import GraphSpec, stage_key
from pyrexport.runtime.errors import CheckFailed
from pyrexport.targets.forms import OnnxForm
from pyrexport.targets.trt.check import BuildLog, check_engine


def form_of(*nodes: tuple[str, str], dtype: int = 2) -> OnnxForm:
    """A network of two graphs, as far as the check reads it."""
    made = SimpleNamespace(op_type="DequantizeLinear" if dtype == 1 else "Cast")
    value = SimpleNamespace(dtype=SimpleNamespace(itemsize=dtype), producer=lambda: made)
    graph = [SimpleNamespace(op_type=kind, name=name, inputs=[value]) for kind, name in nodes]
    graphs = tuple(GraphSpec(stage_key(index), (), ()) for index in range(2))
    return OnnxForm("stages", SimpleNamespace(graph=graph), {}, Path("weights"), graphs)


LINE = "Name: {kernel}_myl{profile}_1, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: {node} [profile {profile}]]"
GEMM = (
    "Name: {node}_myl{profile}_1, LayerType: gemm, Inputs: [ {{ Name: x, Datatype: {dtype}, Format: (Linear) }}], "
    "Metadata: [ONNX Layer: {node} [profile {profile}]]"
)


def log_of(*kernels: tuple[str, str]) -> BuildLog:
    log = BuildLog()
    for kernel, node in kernels:
        for profile in range(2):
            log.read(LINE.format(kernel=kernel, node=node, profile=profile))
    return log


def test_a_sound_log_passes():
    form = form_of(("MatMul", "product"), ("Attention", "attend"))
    reports = check_engine(form, log_of(("gemm", "product"), ("_gemm_mha_v2", "attend")))
    assert reports.keys() == {"stage0", "stage1"}
    assert reports["stage1"].line == "1 products inside, no scatter, attention fused 1 of 1"
    assert reports["stage1"].facts["fused_attention"] == 1


def test_a_product_of_integers_has_a_kernel_of_8_bits_in_every_profile():
    form, log = form_of(("MatMul", "product"), dtype=1), BuildLog()
    for profile, dtype in enumerate(("Int8", "BFloat16")):
        log.read(GEMM.format(node="product", profile=profile, dtype=dtype))
    with pytest.raises(CheckFailed, match="the product 'product' is not of 8 bits in every profile"):
        check_engine(form, log)
    log.read(GEMM.format(node="product", profile=1, dtype="FP8"))
    found = check_engine(form, log)["stage0"]
    assert found.facts["rounded_products"] == 1
    assert found.line == "1 products inside, 1 of them in 8 bits, no scatter"


def test_attention_that_is_not_fused_fails_with_its_name():
    form = form_of(("MatMul", "product"), ("Attention", "attend"))
    log = log_of(("gemm", "product"), ("softmax", "attend"))
    with pytest.raises(CheckFailed, match="attention 'attend' is fused in 0 of 2 profiles"):
        check_engine(form, log)
    for _ in range(2):  # twice in one profile is not once in both
        log.read(LINE.format(kernel="_gemm_mha_v2", node="attend", profile=0))
    with pytest.raises(CheckFailed, match="fused in 1 of 2"):
        check_engine(form, log)
    with pytest.raises(CheckFailed, match="names no layers"):
        check_engine(form, BuildLog())
    wide = form_of(("MatMul", "product"), ("Attention", "attend"), dtype=4)
    assert check_engine(wide, log)["stage0"].facts["fused_attention"] == 0  # float32 has no such kernel


def test_scatter_a_product_outside_and_weights_twice_fail():
    sound = log_of(("gemm", "product"))
    with pytest.raises(CheckFailed, match="no scatter, found 'place'"):
        check_engine(form_of(("MatMul", "product"), ("ScatterND", "place")), sound)
    with pytest.raises(CheckFailed, match="the matrix product 'other' is not in every profile"):
        check_engine(form_of(("MatMul", "product"), ("MatMul", "other")), sound)
    sound.read("Total Weights Memory: 99000000")
    with pytest.raises(CheckFailed, match="expected 0 bytes of weights, the engine holds 99,000,000"):
        check_engine(form_of(("MatMul", "product")), sound)
