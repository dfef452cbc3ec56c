"""A session of TensorRT on a stand-in for the device."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyrexport
import pytest
from pyrexport.runtime.bundle.graphs import decoder_key, graph_specs, stage_key
from pyrexport.runtime.bundle.manifest import MANIFEST_FILE
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.pipeline.pipeline import Pipeline
from pyrexport.targets.trt import session
from pyrexport.targets.trt.cuda import Cuda
from support import trt_stand_in
from support.builders import resign
from support.trt_stand_in import Device, Runtime

pytest.importorskip("tensorrt_rtx")


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


def finest(pipeline: Pipeline) -> tuple[int, ...]:
    return pipeline.model.stages(pipeline.bundle.manifest.resolution)[0].latent


def test_the_decoders_caches_stay_on_the_device(device, engines):
    """Latents go up and frames come down; the caches of a frame are copied within the device to the next run."""
    with pyrexport.load(engines, resident=True) as pipeline:
        latent = np.random.default_rng(0).standard_normal(finest(pipeline), np.float32)
        video = np.concatenate(list(pipeline.decode(latent)))
        spec = pipeline.bundle.manifest.graphs[decoder_key("vae", first=False)].spec
        cache = spec.inputs[1].shape[0] * 4
        assert device.copied == {"in": latent.nbytes, "out": video.size * 4, "within": (latent.shape[1] - 1) * cache}
        assert device.leaks > 0
    assert device.leaks == 0


@pytest.mark.parametrize("spare", [0, 1])
def test_caches_are_fetched_where_the_device_has_no_room_for_them(device, engines, spare):
    """Room for the two graphs alone, or for one frame's caches more: the same video, by way of the host."""
    with pyrexport.load(engines, resident=True) as pipeline:
        latent = np.random.default_rng(0).standard_normal(finest(pipeline), np.float32)
        wanted = np.concatenate(list(pipeline.decode(latent)))
        keys = [decoder_key("vae", first=first) for first in (True, False)]
        packed = pipeline.bundle.manifest.graphs[keys[1]].spec.outputs[0].shape[0] * 4
        device.room = sum(map(len, device.memory.values())) + spare * packed
        device.copied["out"] = 0
        found = np.concatenate(list(pipeline.decode(latent)))
    np.testing.assert_array_equal(found, wanted)
    assert device.copied["out"] > wanted.size * 4


def test_parity_on_a_device(device, engines, tiny, cli):
    result = cli("parity", engines, "--reference", tiny, "--quiet", "--json", "--no-decode")
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert levels["stages"]["relative_l2"] < 1e-5  # float32 on both sides
    assert levels["vae"]["relative_l2"] < 1e-5


def zero_text(pipeline: Pipeline) -> Any:
    return np.zeros((pipeline.model.text_length, pipeline.model.transformer.text_dim), np.float32)


def test_stages_share_one_engine_and_buffers_are_allocated_once(device, engines):
    with pyrexport.load(engines) as pipeline:
        text = zero_text(pipeline)
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
        text = zero_text(pipeline)
        with pytest.raises((CheckFailed, UsageError)) as found:
            pipeline(prompt_embeds=text, output_type="latent", schedule="2-2-1")
    assert "\n" not in str(found.value)


def damaged_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def upload_less(self: Cuda, address: int, values: Any, stream: Any) -> None:
        upload(self, address, values[..., :-1].copy(), stream)

    monkeypatch.setattr(Cuda, "upload", upload_less)


def damaged_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "upload", lambda self, address, values, stream: upload(self, address + 4, values, stream))


def damaged_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session._Program, "find_profile", lambda self, name, spec: 0)


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
        patch.setitem(sys.modules, "tensorrt_rtx", trt_stand_in.tensorrt(device, open_bundle(engines), networks))
        patch.setattr("cuda.bindings.runtime", Runtime(device))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        damage(patch)
        with pytest.raises((AssertionError, CheckFailed)), pyrexport.load(engines) as pipeline:  # noqa: PT012
            tensors = pipeline.bundle.manifest.graphs[stage_key(1)].spec.inputs
            rng = np.random.default_rng(0)
            inputs = {tensor.name: rng.standard_normal(tensor.shape, np.float32) for tensor in tensors}
            out = pipeline.run(stage_key(1), inputs)["velocity"]
            np.testing.assert_allclose(out, reference_of(networks, "stage1", inputs), rtol=0, atol=1e-5)
    session._Program.opened.clear()


def reference_of(networks: Path, graph: str, inputs: dict[str, Any]) -> Any:
    return ort.InferenceSession(str(networks / f"{graph}.onnx")).run(None, inputs)[0]


def test_kernels_that_were_compiled_are_kept(device, engines, tmp_path):
    for _ in range(2):
        with pyrexport.load(engines) as pipeline:
            pipeline.open(stage_key(2))
    (kept,) = (tmp_path / "cache" / "pyrexport" / "trt").iterdir()
    assert kept.read_bytes() == b"kernels"
    assert device.calls.count("cache read") == 1  # the first time there was none


def test_inputs_are_checked_before_the_device_is_touched(device, engines):
    with pyrexport.load(engines) as pipeline:
        engine = pipeline.open(stage_key(1))
        with pytest.raises(UsageError, match="input 'latent' is missing"):
            engine.run({})
        assert "cudaMemcpyAsync" not in device.calls
        engine.close()
        engine.close()
        tensors = pipeline.bundle.manifest.graphs[stage_key(1)].spec.inputs
        with pytest.raises(CheckFailed, match="is closed"):
            engine.run({tensor.name: np.zeros(tensor.shape, np.float32) for tensor in tensors})


def test_bench_runs_on_a_device(device, engines, cli):
    result = cli("bench", engines, "--runs", "1", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["graphs"]["stage0"]["calls"] > 0


def test_an_output_of_another_size_is_refused_before_it_is_written(device, engines, tmp_path):
    """A manifest whose caches are smaller than the engine's: the engine would write past its buffer."""
    broken, manifest, first = tmp_path / "bundle", open_bundle(engines).manifest, decoder_key("vae", first=True)
    assert manifest.text is not None
    shutil.copytree(engines, broken)
    decoder: Any = manifest.model.decoders["vae"]
    model = replace(manifest.model, decoders={"vae": replace(decoder, base_dim=decoder.base_dim // 2)})
    specs = graph_specs(model, {manifest.resolution: list(manifest.decoders.values())}, manifest.text.lengths)[
        manifest.resolution
    ]
    graphs = {key: replace(manifest.graphs[key], spec=spec) for key, spec in specs.items()}
    assert graphs[first].spec.outputs[0].shape < manifest.graphs[first].spec.outputs[0].shape
    document = replace(manifest, model=model, sizes=(replace(manifest.sizes[0], graphs=graphs),)).to_json()
    (broken / MANIFEST_FILE).write_text(json.dumps(document))
    with pyrexport.load(broken) as pipeline:
        inputs = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in graphs[first].spec.inputs}
        with pytest.raises(CheckFailed, match="refuses an output of the manifest's shape"):
            pipeline.run(first, inputs)


def test_engines_in_turn_compute_what_one_does(device_of_parts, cut, networks):
    """With no copy between them: three inputs go in and a velocity comes out. All compute in one piece of memory."""
    device = device_of_parts
    with pyrexport.load(cut / "bundle") as pipeline:
        for index in range(3):
            entry = pipeline.bundle.manifest.graphs[stage_key(index)]
            rng = np.random.default_rng(index)
            inputs = {tensor.name: rng.standard_normal(tensor.shape, np.float32) for tensor in entry.spec.inputs}
            out = pipeline.run(entry.spec.key, inputs)["velocity"]
            np.testing.assert_allclose(out, reference_of(networks, entry.spec.name, inputs), rtol=0, atol=1e-5)
            assert device.calls.count("cudaMemcpyAsync") == 4 * (index + 1)
        count = entry.facts["engines"]
        assert device.alive == 2 * count > 4
        assert [len(each) for each in device.memory.values()].count(trt_stand_in.Engine.device_memory_size_v2) == 1


def test_what_crosses_takes_over_memory_that_is_needed_no_more(device_of_parts, cut):
    """Of four engines, the second to the fourth take the tokens of the one before: two pieces of memory, not three."""
    with pyrexport.load(cut / "bundle") as pipeline:
        engine = pipeline.open(stage_key(0))
        tokens = [t.address for name, t in engine.tensors.items() if t.shape[:2] == (1, 80) and len(t.shape) == 3]
    assert len(set(tokens)) < len(tokens)


@pytest.mark.parametrize(("name", "call"), [("cudaMalloc", 2), ("cudaMalloc", 7), ("deserialize_cuda_engine", 2)])
def test_an_error_among_several_engines_leaks_nothing(device_of_parts, cut, name, call):
    device_of_parts.fault = name, call
    with pyrexport.load(cut / "bundle") as pipeline, pytest.raises((CheckFailed, UsageError)):
        pipeline.open(stage_key(0))


def test_engines_that_are_exchanged_or_missing_are_refused(device_of_parts, cut, tmp_path):
    bundle = Path(shutil.copytree(cut / "bundle", tmp_path / "bundle"))
    one, other = bundle / "stages-2.engine", bundle / "stages-3.engine"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    with pytest.raises(CheckFailed, match=r"stages-2\.engine"):
        pyrexport.load(bundle)
    resign(bundle)
    with pyrexport.load(bundle) as pipeline, pytest.raises(UsageError, match=r"stages-2\.engine is not the engine of"):
        pipeline.open(stage_key(0))
    one.unlink()
    with pytest.raises(CheckFailed, match=r"stages-2\.engine is missing"):
        pyrexport.load(bundle)
    document = json.loads((bundle / MANIFEST_FILE).read_text())
    del document["files"][one.name]
    resign(bundle, files=document["files"])
    with pyrexport.load(bundle) as pipeline, pytest.raises(UsageError, match=r"stages-2\.engine is missing"):
        pipeline.open(stage_key(0))
