"""TensorRT: engines built without a GPU, their networks on ONNX Runtime, the session on a stand-in for the device."""

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pyrexport
import pytest
import torch
from click.testing import CliRunner
from pyrexport.cli import main
from pyrexport.export.bundle.build import build_bundle
from pyrexport.export.bundle.parts import Options
from pyrexport.export.bundle.work import Work
from pyrexport.export.families.wan.names import to_diffusers
from pyrexport.export.proof.networks import graph_pipeline
from pyrexport.runtime.bundle.engines import EngineOptions, find_target
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.reporter import Reporter
from pyrexport.targets.trt import library, session
from pyrexport.targets.trt.check import BuildLog, check_engine
from pyrexport.targets.trt.cuda import Cuda
from support import trt_stand_in
from support.builders import resign
from support.trt_stand_in import Device, Runtime

pytest.importorskip("tensorrt_rtx")

SMALL = "17x64x64"
LEAN = ("--no-text-encoder", "--no-vae")


@pytest.fixture(scope="session")
def make_engines(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_engines("--kind", "ppf", precision="bf16")`: a bundle of a tiny checkpoint for TensorRT, at 17x64x64."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*arguments: str, **options: str) -> Path:
        given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        key = (*arguments, *given)
        if key not in made:
            out = tmp_path_factory.mktemp("engines") / "bundle"
            command = ["build", str(make_checkpoint(*arguments)), "--target", "trt", "-o", str(out), "--quiet", *given]
            if "--compute-capability" not in given:
                command += ["--compute-capability", "8.9"]
            if "--resolution" not in given:
                command += ["--resolution", SMALL]
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 0, result.output
            made[key] = out
        return made[key]

    return make


@pytest.fixture(scope="session")
def engines(make_engines: Callable[..., Path]) -> Path:
    """The tiny pyramidal checkpoint in float32. Not to be changed: copy it."""
    return make_engines(precision="fp32")


def checkpoint_of(folder: Path) -> Any:
    return read_checkpoint(folder, resolution=Resolution.parse(SMALL), rename=to_diffusers)


@pytest.fixture(scope="session")
def networks(engines: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of `engines` for ONNX Runtime, one file for each graph."""
    folder = tmp_path_factory.mktemp("networks")
    graph_pipeline(open_bundle(engines), checkpoint_of(tiny), folder, EngineOptions()).close()
    return folder


@pytest.fixture
def device(engines: Path, networks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    """A pretended GPU that runs the engines of `engines`; a test that leaves anything on it fails."""
    device = Device()
    document = json.loads((engines / "manifest.json").read_text())
    fake = trt_stand_in.tensorrt(device, engines, document, networks, document["engine"]["version"])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr("cuda.bindings.runtime", Runtime(device))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield device
    assert device.leaks == 0
    assert not session._Program.opened


def test_a_video_comes_out_of_the_session(device, engines, bundle, cli, tmp_path):
    """All of `sample` but the GPU: the same video as ONNX Runtime makes of the same checkpoint, to float32 rounding."""
    with pyrexport.load(engines) as pipeline:
        found = pipeline("a cat", seed=3)
    assert device.leaks == 0
    with pyrexport.load(bundle) as pipeline:
        wanted = pipeline("a cat", seed=3)
    np.testing.assert_allclose(found.latents, wanted.latents, rtol=0, atol=1e-4)
    assert np.abs(found.frames.astype(int) - wanted.frames).max() <= 1
    result = cli("sample", engines, "--prompt", "a cat", "-o", tmp_path / "cat.mp4", "--quiet")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cat.mp4").stat().st_size > 0


def test_parity_on_a_device(device, engines, tiny, cli):
    result = cli("parity", engines, "--reference", tiny, "--quiet", "--json", "--no-decode")
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert levels["stages"]["relative_l2"] < 1e-5  # float32 on both sides
    assert levels["vae"]["relative_l2"] < 1e-5


def test_stages_share_one_engine_and_buffers_are_allocated_once(device, engines):
    with pyrexport.load(engines) as pipeline:
        text = np.zeros((pipeline.model.text_length, pipeline.bundle.manifest.config.text_dim), np.float32)
        pipeline(prompt_embeds=text, output_type="latent", schedule="2-2-1")
        before = device.calls.count("cudaMalloc")
        assert before == 3 * 4  # three inputs and a velocity for each stage
        assert device.alive == 2  # one engine, one context
        assert device.calls.count("set_optimization_profile_async") == 3
        pipeline(prompt_embeds=text, output_type="latent", schedule="2-2-1")
        assert device.calls.count("cudaMalloc") == before


FAULTS = [
    *[("cudaMalloc", n) for n in (1, 3, 6)],
    *[("cudaMemcpyAsync", n) for n in (1, 3, 4, 9)],
    *[("cudaStreamSynchronize", n) for n in (1, 2)],
    ("cudaStreamCreate", 1),
    ("deserialize_cuda_engine", 1),
    ("create_execution_context", 1),
    ("set_optimization_profile_async", 2),
    ("set_input_shape", 2),
    ("set_tensor_address", 3),
    ("execute_async_v3", 2),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_an_error_of_any_call_is_a_line_and_leaks_nothing(device, engines, fault):
    """Fixture `device` looks for leaks. A stream that fails once is synchronised again before memory is freed."""
    device.fault = fault
    with pyrexport.load(engines) as pipeline:
        text = np.zeros((pipeline.model.text_length, pipeline.bundle.manifest.config.text_dim), np.float32)
        with pytest.raises((CheckFailed, UsageError)) as found:
            pipeline(prompt_embeds=text, output_type="latent", schedule="2-2-1")
    assert "\n" not in str(found.value)


def damaged_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "upload", lambda self, address, values, stream: upload(self, address, values[..., :-1].copy(), stream))  # fmt: skip


def damaged_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "upload", lambda self, address, values, stream: upload(self, address + 4, values, stream))


def damaged_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session._Program, "find_profile", lambda self, name, specs: 0)


def damaged_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Cuda, name: str, *arguments: Any) -> Any:
        return None if name == "cudaStreamSynchronize" else checked(self, name, *arguments)

    monkeypatch.setattr(Cuda, "call", call)


upload, checked = Cuda.upload, Cuda.call


@pytest.mark.parametrize("damage", [damaged_size, damaged_pointer, damaged_profile, damaged_waiting])
def test_the_stand_in_would_show_a_wrong_session(engines, networks, tmp_path, damage):
    """Without this the tests above could pass on a session that does nothing right."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        document = json.loads((engines / "manifest.json").read_text())
        version = document["engine"]["version"]
        fake = trt_stand_in.tensorrt(device, engines, document, networks, version)
        patch.setitem(sys.modules, "tensorrt_rtx", fake)
        patch.setattr("cuda.bindings.runtime", Runtime(device))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        damage(patch)
        with pytest.raises((AssertionError, CheckFailed)), pyrexport.load(engines) as pipeline:  # noqa: PT012
            specs = pipeline.bundle.manifest.graphs["stage1"].inputs
            rng = np.random.default_rng(0)
            inputs = {name: rng.standard_normal(spec["shape"], np.float32) for name, spec in specs.items()}
            out = pipeline.run("stage1", inputs)["velocity"]
            np.testing.assert_allclose(out, reference_of(networks, "stage1", inputs), rtol=0, atol=1e-5)
    session._Program.opened.clear()


def reference_of(networks: Path, graph: str, inputs: dict[str, Any]) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(networks / f"{graph}.onnx")).run(None, inputs)[0]


def test_kernels_that_were_compiled_are_kept(device, engines, tmp_path):
    for _ in range(2):
        with pyrexport.load(engines) as pipeline:
            pipeline.open("stage2")
    (kept,) = (tmp_path / "cache" / "pyrexport" / "trt").iterdir()
    assert kept.read_bytes() == b"kernels"
    assert device.calls.count("cache read") == 1  # the first time there was none


def test_inputs_are_checked_before_the_device_is_touched(device, engines):
    with pyrexport.load(engines) as pipeline:
        engine = pipeline.open("stage1")
        with pytest.raises(UsageError, match="input 'latent' is missing"):
            engine.run({})
        assert "cudaMemcpyAsync" not in device.calls
        engine.close()
        engine.close()
        specs = pipeline.bundle.manifest.graphs["stage1"].inputs
        with pytest.raises(CheckFailed, match="is closed"):
            engine.run({name: np.zeros(spec["shape"], np.float32) for name, spec in specs.items()})


# What is missing.


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
        pipeline.open("stage0")


def test_options_of_other_engines_are_refused(engines, refused, tmp_path):
    how = ("--prompt", "a cat", "-o", tmp_path / "x.mp4", "--quiet")
    for option in (("--threads", "2"), ("--prepack",), ("--provider", "CUDAExecutionProvider")):
        assert "runs on a GPU" in refused("sample", engines, *how, *option)


def test_bench_runs_on_a_device(device, engines, cli):
    result = cli("bench", engines, "--runs", "1", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["graphs"]["stage0"]["calls"] > 0


def test_an_output_of_another_size_is_refused_before_it_is_written(device, engines, tmp_path):
    """A manifest whose caches are smaller than the engine's: the engine would write past its buffer."""
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    graphs = json.loads((broken / "manifest.json").read_text())["graphs"]
    for shape in (
        graphs["vae_first"]["outputs"]["packed"]["shape"],
        graphs["vae_next"]["outputs"]["packed"]["shape"],
        graphs["vae_next"]["inputs"]["cache_0"]["shape"],
    ):
        shape[0] -= 8
    resign(broken, graphs=graphs)
    with pyrexport.load(broken) as pipeline:
        specs = pipeline.bundle.manifest.graphs["vae_first"].inputs
        inputs = {name: np.zeros(spec["shape"], np.float32) for name, spec in specs.items()}
        with pytest.raises(CheckFailed, match="refuses an output of the manifest's shape"):
            pipeline.run("vae_first", inputs)


@pytest.mark.parametrize(
    "facts",
    [
        {"activation_bytes": 10**400}, {"fused_attention": -1}, {"compute_capabilities": []}, {"library": "evil"},
        {"compute_capabilities": ["[/red]"]}, {"network": "x"}, {"products": "many"},
    ],
    ids=lambda facts: str(facts)[:30],
)  # fmt: skip
def test_facts_that_are_none_are_refused(engines, refused, tmp_path, facts):
    broken = tmp_path / "bundle"
    shutil.copytree(engines, broken)
    graphs = json.loads((broken / "manifest.json").read_text())["graphs"]
    graphs["stage0"]["facts"] |= facts
    resign(broken, graphs=graphs)
    assert next(iter(facts)) in refused("inspect", broken)


def test_options_that_are_none_are_refused(engines, tiny, refused, tmp_path):
    for option in ({"precision": "zz"}, {"vae_tile": "ab"}, {"layout": 5}, {"more": 1}):
        broken = tmp_path / next(iter(option))
        shutil.copytree(engines, broken)
        provenance = json.loads((broken / "manifest.json").read_text())["provenance"]
        provenance["options"] |= option
        resign(broken, provenance=provenance)
        assert "other options" in refused("parity", broken, "--reference", tiny, "--graph", "--quiet")


# Building.


def test_a_disk_that_fills_while_an_engine_is_written_leaves_no_bundle(make_checkpoint, tmp_path):
    """TensorRT itself goes on when its writer fails. The engine takes 14 MB; files may grow to 4."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = Options("bf16", "bf16", compute_capabilities=("8.9",))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        with pytest.raises(CheckFailed, match="cannot grow further"):
            build_bundle(
                checkpoint_of(make_checkpoint(*LEAN)), "trt", find_target("trt"), tmp_path / "out", options=options
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_building_says_what_is_wrong(tiny, engines, refused, tmp_path):
    out = ("--target", "trt", "-o", tmp_path / "out", "--resolution", SMALL)
    assert "give --compute-capability" in refused("build", tiny, *out)
    assert "found '9.0'" in refused("build", tiny, *out, "--compute-capability", "9.0")
    assert "found 'x'" in refused("build", tiny, *out, "--compute-capability", "x")
    with_one = (*out, "--compute-capability", "8.9")
    assert "--text-precision bf16" in refused("build", tiny, *with_one, "--text-precision", "fp16")
    assert "caches in fp32" in refused("build", tiny, *with_one, "--vae-caches", "fp16")
    ort = ("--target", "ort", "-o", tmp_path / "out")
    assert "neither layouts" in refused("build", tiny, *ort, "--layout", "per-stage")
    assert "neither layouts" in refused("build", tiny, *ort, "--compute-capability", "8.9")
    assert not (tmp_path / "out").exists()


def test_one_engine_holds_all_stages_with_its_weights_once(make_engines, make_checkpoint):
    """Tiny: what counts is that the engine says so itself; the sizes of real models are in docs/benchmarks.md.

    With 9,408 tokens, whose rotary tables would be larger than the weights if the engine held them.
    """
    options = {"precision": "bf16", "resolution": "81x256x448"}
    bundle = open_bundle(make_engines(*LEAN, **options))
    graphs = bundle.manifest.graphs
    assert {name: graph.file for name, graph in graphs.items() if name.startswith("stage")} == dict.fromkeys(
        ("stage0", "stage1", "stage2"), "stages.engine"
    )
    for name in ("stage0", "stage1", "stage2"):
        facts = graphs[name].facts
        assert facts["fused_attention"] == facts["attention"] == 4
        assert facts["compute_capabilities"] == ["8.9"]
        assert facts["activation_bytes"] > 0
    stored = graphs["stage0"].facts["weights_bytes"]
    assert stored < 4 * sum(entry.elements for entry in read_checkpoint(make_checkpoint(*LEAN)).transformer.values())
    per_stage = open_bundle(make_engines(*LEAN, **options, layout="per-stage"))
    files = {graph.file for name, graph in per_stage.manifest.graphs.items() if name.startswith("stage")}
    assert files == {"stage0.engine", "stage1.engine", "stage2.engine"}
    assert sum(per_stage.manifest.graphs[f"stage{n}"].facts["weights_bytes"] for n in range(3)) > 2.5 * stored


def test_the_same_input_gives_the_same_bytes(tiny, tmp_path):
    """The stages, and the decoder's first graph, twice each in one process, where a heap is never twice the same."""
    options = Options("bf16", "bf16", compute_capabilities=("8.6", "12.0"))
    target: Any = find_target("trt")
    work = Work(checkpoint_of(tiny), "trt", target, tmp_path, options, Reporter())
    work.parts = [part for part in work.parts if part.name.startswith("stage") or part.name == "vae_first"]
    for form in work.networks():
        found = []
        for _ in range(2):
            assert all(lowering.line for lowering in target.write_program(form.name, [form], tmp_path))
            found.append((tmp_path / f"{form.name}.engine").read_bytes())
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [(("--kind", "ppf", "--stages", "2", *LEAN), "fp16"), (("--kind", "plain", *LEAN), "fp32")],
    ids=["ppf-fp16", "plain-fp32"],
)
def test_graph_parity(make_engines, make_checkpoint, cli, arguments, precision):
    """Within the tolerance of the precision (see `runtime.parity.TOLERANCES`); bf16 below, pyramidal fp32 above."""
    bundle = make_engines(*arguments, precision=precision)
    reference = make_checkpoint(*arguments)
    result = cli("parity", bundle, "--reference", reference, "--graph", "--quiet", "--json", "--no-decode")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["levels"]["stages"]["relative_l2"] < {"fp32": 1e-5, "fp16": 3e-3}[precision]


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
    checkpoint = checkpoint_of(make_checkpoint(*LEAN))
    graph_pipeline(bundle, checkpoint, folder, EngineOptions()).close()
    model = onnx.load(str(folder / "stage2.onnx"))
    short = {"blocks.0.attn1.to_q.weight"}
    for tensor in model.graph.initializer:
        if tensor.name in short:
            assert tensor.data_type == onnx.TensorProto.BFLOAT16
            words = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            entry = checkpoint.transformer["blocks.0.attn1.to_q.weight"]
            from safetensors.torch import load_file

            wanted = load_file(entry.file)[entry.name].to(torch.bfloat16).float().T
            np.testing.assert_array_equal(words.view(np.float32).reshape(wanted.shape), wanted.numpy())
            short.clear()
    assert not short
    kinds = {node.op_type for node in model.graph.node}
    assert "Attention" not in kinds
    assert not any(kind.startswith("Scatter") for kind in kinds)


# The check of a build's log.


def form_of(*nodes: tuple[str, str], dtype: int = 2) -> Any:
    value = SimpleNamespace(dtype=SimpleNamespace(itemsize=dtype))
    graph = [SimpleNamespace(op_type=kind, name=name, inputs=[value]) for kind, name in nodes]
    return SimpleNamespace(
        name="stages", model=SimpleNamespace(graph=graph), profiles={"stage0": (), "stage1": ()}, placements={}
    )


LINE = "Name: {kernel}_myl{profile}_1, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: {node} [profile {profile}]]"


def log_of(*kernels: tuple[str, str]) -> BuildLog:
    log = BuildLog()
    for kernel, node in kernels:
        for profile in range(2):
            log.read(LINE.format(kernel=kernel, node=node, profile=profile))
    return log


def test_a_sound_log_passes():
    form = form_of(("MatMul", "product"), ("Attention", "attend"))
    reports = check_engine(form, log_of(("gemm", "product"), ("_gemm_mha_v2", "attend")))
    assert reports["stage1"].facts["fused_attention"] == 1


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


def test_a_build_whose_attention_is_not_fused_leaves_no_bundle(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.targets.trt.check.ATTENTION_KERNEL", re.compile("never"))
    checkpoint = checkpoint_of(make_checkpoint(*LEAN))
    with pytest.raises(CheckFailed, match=r"attention '.*' is fused in 0 of 3 profiles"):
        build_bundle(
            checkpoint, "trt", find_target("trt"), tmp_path / "out",
            options=Options("bf16", "bf16", compute_capabilities=("8.9",)),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_tensorrt_is_chosen_where_it_and_a_gpu_are(monkeypatch):
    device = Device()
    monkeypatch.setattr("cuda.bindings.runtime", Runtime(device))
    monkeypatch.setattr(library, "installed_version", lambda name: "10.13")
    assert library.building_library() == "tensorrt"
    assert library.capabilities_to_build(()) == ("8.9",)
    with pytest.raises(UsageError, match=r"tensorrt 10\.13 builds here for compute capability 8\.9, found '8\.6'"):
        library.capabilities_to_build(("8.6",))
    device.count_status = ("cudaErrorNoDevice", 0)
    assert library.building_library() == "tensorrt-rtx"
