"""Bundles for a provider: taken whole, run, proved, and refused where something is missing."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import onnx_ir as ir
import pytest
from pyrexport.runtime.bundle import engines
from pyrexport.targets import plugins
from pyrexport.targets.ort import providers, session
from pyrexport.targets.ort.providers import PROVIDERS, Provider
from support.builders import resign
from support.building import LEAN
from support.parity import change_weight

openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="no plug-in is installed")

ONE = ("--blocks", "1", "--stages", "2")
SINGLE = (*LEAN, "--blocks", "1", "--kind", "plain")
PROOF = ("--schedule", "1-1", "--prompt", "a cat", "--quiet")


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(*ONE)


@pytest.fixture(scope="session")
def built(make_bundle: Callable[..., Path]) -> Path:
    """For OpenVINO, with all parts. Not to be changed: copy it."""
    return make_bundle(*ONE, provider="openvino")


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@openvino
def test_a_bundle_for_openvino_computes_what_its_checkpoint_does(built, checkpoint, cli):
    result = cli("parity", built, "--reference", checkpoint, "--json", *PROOF)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["levels"]) == {"text", "stages", "chain", "vae", "video"}


@openvino
def test_openvino_takes_every_graph_whole(built):
    """Operators of the standard alone, which OpenVINO has no CPU of ONNX Runtime's to leave to."""
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["engine"]["name"] == "openvino"
    assert manifest["target_options"]["provider"] == "openvino"
    assert set(manifest["graphs"]) >= {"stage0", "stage1", "text_64", "vae_first", "vae_next"}
    for name, graph in manifest["graphs"].items():
        nodes = ir.load(built / f"{name}.onnx").graph
        assert graph["facts"] == {"provider": "openvino", "nodes": len(nodes), "left": {}}
        assert {node.domain for node in nodes} == {""}


@openvino
@pytest.mark.parametrize("command", [("inspect",), ("bench", "--runs", "1", "--schedule", "1-1", "--threads", "1")])
def test_people_are_shown_what_a_provider_took(built, cli, command):
    name, *options = command
    result = cli(name, built, *options, "--quiet")
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.output.splitlines() if "stage0" in line and "openvino" in line)
    assert str(len(ir.load(built / "stage0.onnx").graph)) in row


@openvino
def test_weights_behind_a_link(copied, checkpoint, cli, tmp_path):
    """As in the hub's cache."""
    (copied / "weights.bin").rename(tmp_path / "blob")
    (copied / "weights.bin").symlink_to(tmp_path / "blob")
    result = cli("parity", copied, "--reference", checkpoint, *PROOF)
    assert result.exit_code == 0, result.output


@openvino
def test_a_layer_that_is_off_is_named_by_openvino_itself(copied, checkpoint, cli, monkeypatch):
    """Inner values become outputs of a graph that is no file of the bundle."""
    monkeypatch.setattr(session, "OrtEngine", None)
    change_weight(copied, ["blocks.0.ffn_out.weight"], lambda values: [values[0] * 2])
    result = cli("parity", copied, "--reference", checkpoint, "--bisect", *PROOF)
    assert result.exit_code == 1
    assert "blocks.0.ffn.net.2" in result.output


@openvino
@pytest.mark.parametrize("method", ["w8", "w8a8"])
def test_integers_that_openvino_takes(make_checkpoint, lean_recipe, cli, tmp_path, method):
    checkpoint, how = make_checkpoint(*SINGLE), ()
    if method == "w8a8":
        checkpoint, how = make_checkpoint(*LEAN), ("--recipe", lean_recipe)
    command = ("build", checkpoint, "--target", "ort", "--provider", "openvino", "--quantize", method, *how)
    result = cli(*command, "-o", tmp_path / "out", "--resolution", "17x64x64", "--quiet")
    assert result.exit_code == 0, result.output
    schedule = ("--schedule", "1" if method == "w8" else "1-1-1")
    result = cli("parity", tmp_path / "out", "--reference", checkpoint, "--json", *schedule, "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["levels"]["stages"]["relative_l2"] > 1e-4


@openvino
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "w4"), "provider 'openvino' takes matrices in w8 or w8a8, found w4"),
        (("--plan",), "has no plan of memory before it is built"),
    ],
)
def test_what_openvino_is_not_built_for(checkpoint, refused, tmp_path, options, message):
    out = () if "--plan" in options else ("-o", tmp_path / "out")
    how = ("--target", "ort", "--provider", "openvino", *out, *options)
    assert message in refused("build", checkpoint, *how, "--quiet")
    assert not list(tmp_path.iterdir())


@openvino
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "npu"), "finds no device 'npu' here, but CPU"),
        (("--prepack",), "provider 'openvino' has no option 'prepack': leave it out"),
        (("--provider", "CPUExecutionProvider"), "provider 'openvino' has no option 'provider'"),
    ],
)
def test_how_a_bundle_for_openvino_is_not_run(built, refused, tmp_path, options, message):
    how = ("--prompt", "a", "-o", tmp_path / "a.npy", "--quiet", *options)
    assert message in refused("sample", built, *how)


@openvino
def test_arithmetic_that_the_cpu_does_not_have(built, refused, cli, tmp_path):
    import openvino as ov

    has = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    absent = [name for name, capability in (("bf16", "BF16"), ("fp16", "FP16")) if capability not in has]
    if not absent:
        pytest.skip("this CPU has arithmetic of 16 bits")
    how = ("--prompt", "a", "-o", tmp_path / "a.npy", "--quiet", "--arithmetic", absent[0])
    assert f"has no arithmetic in {absent[0]}: take --arithmetic fp32" in refused("sample", built, *how)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "gpu", "provider 'cpu' has no option 'device': leave it out"),
        ("--provider", "openvino", "provider 'openvino' is chosen when a bundle is built"),
        ("--provider", "", "expected a value, found an empty one"),
    ],
)
def test_options_of_providers_are_not_the_cpu_s(bundle, refused, tmp_path, option, value, message):
    how = ("--prompt", "a", "-o", tmp_path / "a.npy", "--quiet", option, value)
    assert message in refused("sample", bundle, *how)


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--provider", "opencv"), "unknown provider 'opencv': expected one of cpu, openvino"),
        (("--provider", "openvino"), "provider 'openvino' needs openvino: pip install 'pyrexport[openvino]'"),
        (("--provider", "nv-tensorrt-rtx"), "was never run by pyrexport's tests"),
        (
            ("--provider", "nv-tensorrt-rtx", "--provider-untested"),
            "needs onnxruntime-ep-nv-tensorrt-rtx: pip install 'onnxruntime-ep-nv-tensorrt-rtx'",
        ),
    ],
)
def test_providers_that_are_not_here(checkpoint, refused, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(plugins, "version", missing)
    assert message in refused("build", checkpoint, "--target", "ort", "-o", tmp_path / "out", *options, "--quiet")
    assert not list(tmp_path.iterdir())


@openvino
@pytest.mark.parametrize("command", ["sample", "parity", "bench"])
def test_a_bundle_is_refused_where_its_provider_is_absent(built, checkpoint, refused, tmp_path, monkeypatch, command):
    monkeypatch.setattr(engines, "version", missing)
    how = {
        "sample": ("--prompt", "a", "-o", tmp_path / "a.npy"),
        "parity": ("--reference", checkpoint),
        "bench": ("--runs", "1"),
    }
    line = refused(command, built, *how[command], "--quiet")
    assert "was built for openvino" in line
    assert "and openvino is not installed: pip install openvino" in line


@openvino
def test_a_newer_version_of_the_provider(copied, checkpoint, refused):
    resign(copied, engine={"name": "openvino", "version": "9999.0"})
    assert "built for openvino 9999.0, found openvino" in refused("parity", copied, "--reference", checkpoint, *PROOF)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`plugin(dialect)`: Qualcomm's, in its emulation, as the provider that any plug-in is: on any machine."""

    def add(dialect: str) -> None:
        import onnxruntime_qnn

        chip = {"soc_model": "69", "htp_arch": "79", "enable_htp_fp16_precision": "1"}
        settings = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **chip}
        provider = Provider("emulated", "onnxruntime-qnn", "QNNExecutionProvider", dialect=dialect, settings=settings)
        monkeypatch.setitem(PROVIDERS, "emulated", provider)

    return add


EMULATED = ("--target", "ort", "--provider", "emulated", "--provider-untested", "--resolution", "17x64x64")


@qnn
@pytest.mark.parametrize("dialect", ["plain", "fused"])
def test_a_plug_in_is_registered_and_what_it_leaves_is_said(plugin, make_checkpoint, cli, tmp_path, dialect):
    """All of the standard's operators, and not those that are ONNX Runtime's own; arithmetic in 11 bits."""
    plugin(dialect)
    checkpoint, out = make_checkpoint(*SINGLE), tmp_path / "out"
    result = cli("build", checkpoint, *EMULATED, "--no-run", "-o", out)
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["engine"]["name"] == "onnxruntime-qnn"
    facts = manifest["graphs"]["stage0"]["facts"]
    assert facts["nodes"] > 50
    assert set(facts["left"]) == ({"MultiHeadAttention", "RotaryEmbedding"} if dialect == "fused" else set())
    assert providers.said_of(facts) in " ".join(result.output.split())
    proved = cli("parity", out, "--reference", checkpoint, "--schedule", "1", "--json", "--quiet")
    assert json.loads(proved.stdout)["levels"]["stages"]["relative_l2"] <= 1e-2


def test_what_a_provider_leaves_to_the_cpu_is_told_by_operator():
    facts = {"provider": "nv-tensorrt-rtx", "nodes": 190, "left": {"Attention": 3, "Gelu": 1}}
    said = "190 of 194 nodes taken by nv-tensorrt-rtx, left to the CPU: 3 Attention, 1 Gelu"
    assert providers.said_of(facts) == said


@qnn
def test_a_plug_in_without_a_device(plugin, checkpoint, refused, tmp_path, monkeypatch):
    plugin("plain")
    monkeypatch.setattr(session, "devices_of", lambda wheel, name: [])
    line = refused("build", checkpoint, *EMULATED, "--quiet", "-o", tmp_path / "out")
    assert "finds no device here: install the driver of its device, or build for another provider" in line


def test_graphs_for_the_cpu_have_no_facts(bundle):
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    assert not any(graph.get("facts") for graph in graphs.values())
