"""What a bundle for TensorRT refuses, and what it says is missing."""

import json
import shutil
import sys

import pyrexport
import pytest
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.targets.trt import library
from support.builders import SMALL, resign
from support.trt_stand_in import Device, Runtime

pytest.importorskip("tensorrt_rtx")


def test_no_driver(engines, refused, tmp_path):
    """This machine has none."""
    line = refused("sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")
    assert "no NVIDIA driver is here" in line
    assert "parity --graph" in line


def test_no_gpu(device, engines, refused, tmp_path):
    device.count_status = ("cudaErrorNoDevice", 0)
    assert "finds no GPU" in refused("sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")


def test_a_capability_that_was_not_built_for(device, engines, refused, tmp_path):
    device.capability = "9.0"
    line = refused("sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")
    assert "built for compute capability 8.9, this GPU has 9.0: build again with --compute-capability 9.0" in line


def test_no_library(engines, tiny, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.targets.trt.library.installed_version", lambda name: None)
    line = refused("sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")
    assert "which is not installed: pip install tensorrt-rtx==" in line
    line = refused("build", tiny, "--target", "trt", "-o", tmp_path / "out", "--quiet")
    assert "needs tensorrt-rtx, which builds without a GPU" in line


def test_another_version_of_the_library(engines, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.targets.trt.library.installed_version", lambda name: "9.9")
    assert "found 9.9" in refused("sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")


def test_no_bindings(engines, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "cuda-bindings is missing" in refused(
        "sample", engines, "--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet"
    )


@pytest.mark.parametrize("share", [0, 2])
def test_a_damaged_engine(device, engines, tmp_path, share):
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    data = (broken / "stages.engine").read_bytes()
    (broken / "stages.engine").write_bytes(data[: len(data) // share if share else 0])
    with pytest.raises(CheckFailed, match=r"stages\.engine"):
        pyrexport.load(broken)
    resign(broken)
    with (
        pyrexport.load(broken) as pipeline,
        pytest.raises(UsageError, match=r"cannot load stages\.engine: "),
    ):
        pipeline.open(stage_key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "vae=w8a8"), "takes the vae in fp32 or fp16 or bf16, found w8a8"),
        (("--quantize", "w8a8-dynamic"), "fp8 or w4a16, found w8a8-dynamic"),
        (
            ("--quantize", "fp8", "--compute-capability", "8.6"),
            "fp8 needs a compute capability of 8.9 or later, found 8.6",
        ),
        (("--quantize", "fp8"), "make a recipe with 'pyrexport calibrate --quantize w8a8'"),
    ],
)
def test_what_it_does_not_store_is_refused(tiny, refused, tmp_path, options, message):
    how = ("--target", "trt", "--compute-capability", "8.9", "-o", tmp_path / "out", "--quiet")
    assert message in refused("build", tiny, *how, *options)


def test_options_of_other_engines_are_refused(engines, refused, tmp_path):
    how = ("--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")
    for option in (("--threads", "2"), ("--prepack",), ("--provider", "CUDAExecutionProvider")):
        assert "runs on a GPU" in refused("sample", engines, *how, *option)


@pytest.mark.parametrize(
    "facts",
    [
        {"activation_bytes": 10**400},
        {"fused_attention": -1},
        {"engines": 0},
        {"compute_capabilities": []},
        {"compute_capabilities": ["[/red]"]},
        {"library": "evil"},
        {"network": "x"},
        {"products": "many"},
    ],
    ids=lambda facts: str(facts)[:30],
)
def test_facts_that_are_none_are_refused(engines, refused, tmp_path, facts):
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    graphs = json.loads((broken / "manifest.json").read_text())["graphs"]
    graphs["stage0"]["facts"] |= facts
    resign(broken, graphs=graphs)
    assert next(iter(facts)) in refused("inspect", broken)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": 5},
        {"engine_limit": "-1"},
        {"layout": "sideways"},
        {"compute_capabilities": "8.9"},
        {"compute_capabilities": ["x"]},
        {"x": 1},
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(engines, tiny, refused, tmp_path, options):
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    written = json.loads((broken / "manifest.json").read_text())["target_options"]
    resign(broken, target_options=written | options)
    assert "other options" in refused("parity", broken, "--reference", tiny, "--graph", "--quiet")


@pytest.mark.parametrize(("part", "name", "value"), [("precision", "vae", "zz"), ("decoders", "tile", "ab")])
def test_a_precision_or_a_tile_that_is_none_is_refused(engines, tiny, refused, tmp_path, part, name, value):
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    written = json.loads((broken / "manifest.json").read_text())[part]
    (written if part == "precision" else written["vae"])[name] = value
    resign(broken, **{part: written})
    assert f"'{name}'" in refused("parity", broken, "--reference", tiny, "--graph", "--quiet")


def test_building_says_what_is_wrong(tiny, engines, refused, tmp_path):
    out = ("--target", "trt", "-o", tmp_path / "out", "--resolution", SMALL)
    assert "give --compute-capability" in refused("build", tiny, *out)
    assert "found '9.0'" in refused("build", tiny, *out, "--compute-capability", "9.0")
    assert "found 'x'" in refused("build", tiny, *out, "--compute-capability", "x")
    with_one = (*out, "--compute-capability", "8.9")
    assert "--precision text_encoder=bf16" in refused("build", tiny, *with_one, "--precision", "text_encoder=fp16")
    line = refused("build", tiny, *with_one, "--library", "tensorrt")
    assert "tensorrt is not installed: pip install tensorrt cuda-bindings, or leave out --library" in line
    assert "caches in fp32" in refused("build", tiny, *with_one, "--vae-caches", "fp16")
    plan = ("--target", "trt", *with_one[4:], "--plan")
    assert "--engine-limit: expected a number of bytes" in refused("build", tiny, *plan, "--engine-limit", "2GB")
    assert "expected a --engine-limit of at least" in refused("build", tiny, *plan, "--engine-limit", "1000", "--quiet")
    ort = ("--target", "ort", "-o", tmp_path / "out")
    assert "no option 'layout'" in refused("build", tiny, *ort, "--layout", "per-stage")
    assert "no option 'compute_capabilities'" in refused("build", tiny, *ort, "--compute-capability", "8.9")
    assert not (tmp_path / "out").exists()


def test_tensorrt_is_chosen_where_it_and_a_gpu_are(monkeypatch):
    device = Device()
    monkeypatch.setattr("cuda.bindings.runtime", Runtime(device))
    monkeypatch.setattr(library, "installed_version", lambda name: "10.13")
    assert library.building_library() == library.building_library("tensorrt") == "tensorrt"
    assert library.building_library("tensorrt-rtx") == "tensorrt-rtx"
    assert library.capabilities_to_build("tensorrt", ()) == ("8.9",)
    with pytest.raises(UsageError, match=r"tensorrt 10\.13 builds here for compute capability 8\.9, found '8\.6'"):
        library.capabilities_to_build("tensorrt", ("8.6",))
    device.count_status = ("cudaErrorNoDevice", 0)
    assert library.building_library() == "tensorrt-rtx"
    with pytest.raises(UsageError, match="tensorrt builds for the GPU that is here, and none is"):
        library.building_library("tensorrt")
