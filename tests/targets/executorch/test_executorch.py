"""The target executorch: lowering, the session without torch, and what a broken program or machine does."""

import json
import os
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from diffusers import AutoencoderKLWan
from pyrexport.cli import main
from pyrexport.export import dialects
from pyrexport.export.bundle.build import Reporter, build_bundle
from pyrexport.export.bundle.parts import Options, graph_parts
from pyrexport.export.families.dialects import FUSED, PORTABLE
from pyrexport.export.lowering.torch import trace
from pyrexport.runtime.bundle.engines import EngineOptions, Lowering, find_target
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.chain.schedules import Schedule, spaced_levels
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.pipeline.features import timestep_features
from pyrexport.targets.executorch.lowering import lower
from pyrexport.targets.executorch.session import ExecutorchEngine
from safetensors.numpy import load_file
from support.builders import pyramid, resign

pytest.importorskip("executorch")
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="the session's library needs a C++ compiler"
)

SMALL = Resolution(17, 64, 64)


class Lines(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def tiny(make_checkpoint, tmp_path_factory) -> Path:
    """Smaller than the other tests': lowering takes its time by the operator."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    shutil.copytree(make_checkpoint("--blocks", "1", "--stages", "2"), folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8, num_res_blocks=0).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory) -> SimpleNamespace:
    """A bundle of the tiny checkpoint with all parts, and what its build said: about two minutes."""
    out, reporter = tmp_path_factory.mktemp("executorch") / "bundle", Lines()
    checkpoint = read_checkpoint(tiny, resolution=SMALL)
    build_bundle(checkpoint, "executorch", find_target("executorch"), out, reporter=reporter)
    return SimpleNamespace(folder=out, lines=reporter.lines)


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd="/"
    )


SAMPLE = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "executorch.runtime"):
    sys.modules[name] = None
import pyrexport
with pyrexport.load({folder!r}, threads=2) as pipeline:
    video = pipeline("a cat", seed=3)
print(video.frames.shape, float(abs(video.latents).sum()))
"""


@pytest.mark.slow
def test_every_method_is_one_piece_of_xnnpack(built):
    """The build takes about two minutes."""
    outside = {line.partition(":")[0]: line.partition("outside of them ")[2] for line in built.lines}
    assert set(outside) == {"stage0", "stage1", "text_64", "vae_first", "vae_next"}
    assert all("1 delegate of XNNPACK" in line for line in built.lines)
    # The caches that the first frame bypasses are zeros, which no product makes.
    assert outside.pop("vae_first") == "aten_full_default"
    assert set(outside.values()) == {"nothing"}


def test_a_bundle_holds_each_weight_once(built, tiny):
    manifest = open_bundle(built.folder).manifest
    assert {graph.file for graph in manifest.graphs.values()} == {"stages.pte", "text.pte", "vae.pte"}
    assert {path.name for path in built.folder.iterdir()} == {*manifest.files, "manifest.json"}
    transformer = sum(entry.elements for entry in read_checkpoint(tiny).transformer.values()) * 4
    # Two graphs: beside 0.44 MB of weights, their operators show.
    assert manifest.files["stages.pte"].nbytes < transformer + 2 * 80_000


def test_parity_with_pytorch(built, tiny, cli):
    how = ("--prompt", "a cat", "--quiet", "--json")
    result = cli("parity", built.folder, "--reference", tiny, *how)
    document = json.loads(result.stdout)
    assert result.exit_code == 0, document
    assert document["levels"]["stages"]["relative_l2"] <= 1e-5
    assert document["levels"]["vae"]["relative_l2"] <= 1e-5
    assert document["levels"]["text"]["relative_l2"] <= 1e-5
    assert document["levels"]["chain"]["relative_l2"] <= 1e-4


def test_parity_notices_a_weight_that_was_changed(copy, tiny, cli):
    """In the program's own data, under a new signature: only parity can tell."""
    file = copy / "stages.pte"
    data = bytearray(file.read_bytes())
    checkpoint = read_checkpoint(tiny)
    entry = checkpoint.transformer["blocks.0.attn1.to_v.weight"]
    with entry.file.open("rb") as source:
        source.seek(entry.offset)
        weight = np.frombuffer(source.read(entry.nbytes), np.float32 if entry.dtype == "F32" else np.float16)
    stored = weight.astype(np.float32).tobytes()
    at = data.find(stored)
    assert at > 0
    assert data.find(stored, at + 1) < 0, "each weight is stored once"
    data[at : at + len(stored)] = (-weight.astype(np.float32)).tobytes()
    file.write_bytes(data)
    resign(copy)
    result = cli("parity", copy, "--reference", tiny, "--prompt", "a cat", "--quiet", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["levels"]["stages"]["passed"] is False


@pytest.mark.slow
def test_a_plain_model(make_checkpoint, cli, tmp_path):
    """One stage, without text encoder and VAE: about 30 s."""
    checkpoint = make_checkpoint("--kind", "plain", "--no-text-encoder", "--no-vae")
    out = tmp_path / "plain"
    result = cli("build", checkpoint, "--target", "executorch", "-o", out, "--resolution", "17x64x64", "--quiet")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"manifest.json", "stages.pte"}
    assert cli("parity", out, "--reference", checkpoint, "--schedule", "2", "--quiet").exit_code == 0


def test_it_samples_where_torch_cannot_be_imported(built):
    first = run_python(SAMPLE.format(folder=str(built.folder)))
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.startswith("(17, 64, 64, 3)")
    assert run_python(SAMPLE.format(folder=str(built.folder))).stdout == first.stdout


@pytest.mark.slow
def test_the_wheel_without_its_dependencies_is_enough(built, tmp_path):
    """What docs/executorch.md tells a device to install; the environment takes about 40 s."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "numpy", "tokenizers", "click", "rich"], check=True, capture_output=True)
    subprocess.run([*install, "--no-deps", "executorch"], check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(linked(tmp_path))!r})" + SAMPLE.format(folder=str(built.folder))
    entry = tmp_path / "links" / "pyrexport-0.dist-info"  # entry points are found through metadata
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: pyrexport\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[pyrexport.targets]\nexecutorch = pyrexport.targets.executorch\n")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(17, 64, 64, 3)")
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert not {line.split()[0] for line in listed.splitlines()} & {"torch", "onnxruntime", "onnx", "diffusers"}


def linked(folder: Path) -> Path:
    (folder / "links").mkdir()
    (folder / "links" / "pyrexport").symlink_to(ROOT)
    return folder / "links"


def test_without_a_compiler_the_official_runtime_is_used_and_said(built, tmp_path):
    environment = {"CXX": "/no/such/compiler", "XDG_CACHE_HOME": str(tmp_path)}
    code = f"import pyrexport; print(pyrexport.load({str(built.folder)!r})('a cat', seed=3).frames.shape)"
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    assert "(17, 64, 64, 3)" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyrexport: no C++ compiler")
    assert "torch" in line
    refused = run_python(SAMPLE.format(folder=str(built.folder)), **environment)
    assert refused.stderr.strip().splitlines()[-1].startswith("pyrexport.runtime.errors.UsageError: without a C++")


def test_a_cache_folder_that_cannot_be_written_costs_a_compilation_only(built):
    done = run_python(SAMPLE.format(folder=str(built.folder)), XDG_CACHE_HOME="/dev/null/cache")
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_fails_is_named(built, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'shim.cpp:1: error: it is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run_python(SAMPLE.format(folder=str(built.folder)), CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert "cannot compile the ExecuTorch session: shim.cpp:1: error: it is broken" in done.stderr


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "head"])
def test_a_damaged_program_is_refused_in_one_line(copy, refused, damage, tmp_path):
    """Under a signature of its own, so that ExecuTorch itself has to notice."""
    file = copy / "stages.pte"
    data = file.read_bytes()
    broken = {"cut": data[: len(data) // 2], "garbage": b"x" * 4096, "empty": b"", "head": b"\0" * 64 + data[64:]}
    file.write_bytes(broken[damage])
    resign(copy)
    line = refused("sample", copy, "--prompt", "a cat", "-o", tmp_path / "a.npy", "--quiet")
    assert "executorch cannot open stages.pte: not a program of this version" in line


def test_a_flipped_byte_is_noticed_before_anything_is_loaded(copy, cli, tmp_path):
    file = copy / "vae.pte"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = cli("sample", copy, "--prompt", "a cat", "-o", tmp_path / "a.npy", "--quiet")
    assert result.exit_code == 1
    assert "vae.pte is damaged" in result.stderr


def test_a_bundle_of_a_newer_executorch_is_refused(copy, refused, tmp_path):
    resign(copy, engine={"name": "executorch", "version": "99.0.0"})
    line = refused("sample", copy, "--prompt", "a cat", "-o", tmp_path / "a.npy", "--quiet")
    assert "was built for executorch 99.0.0, found executorch" in line


def test_programs_exchanged_under_a_new_signature_are_refused(copy, refused, tmp_path):
    shutil.copy(copy / "text.pte", copy / "stages.pte")
    resign(copy)
    line = refused("sample", copy, "--prompt", "a cat", "-o", tmp_path / "a.npy", "--quiet")
    assert "executorch cannot load stages.pte: it has no method stage1" in line


@pytest.fixture(scope="module")
def engine(built):
    entry = open_bundle(built.folder).manifest.graphs["stage1"]
    specs = {"inputs": entry.inputs, "outputs": entry.outputs}
    opened = ExecutorchEngine(built.folder / entry.file, "stage1", specs, EngineOptions())
    yield opened
    opened.close()


def test_other_threads_are_refused_while_a_program_is_open(built):
    """ExecuTorch's pool is one for the process, and loaded methods hold on to it."""
    code = f"""
import pyrexport
from pyrexport.runtime.errors import UsageError
one, other = (pyrexport.load({str(built.folder)!r}, threads=n) for n in (2, 1))
first = one("a cat", schedule="2-1", output_type="latent").latents
try:
    other("a cat")
except UsageError as error:
    print(error)
assert (one("a cat", schedule="2-1", output_type="latent").latents == first).all()
one.close()
other("a cat", output_type="latent")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "programs that are open use 2 threads: close them before others are opened with 1" in done.stdout


def test_one_engine_serves_several_threads(engine):
    """One after the other, each with its own answer."""
    generator = np.random.default_rng(0)
    shapes = {name: spec["shape"] for name, spec in engine.specs["inputs"].items()}
    inputs = [{n: generator.standard_normal(shape, np.float32) for n, shape in shapes.items()} for _ in range(4)]
    wanted = [engine.run(values)["velocity"] for values in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: engine.run(inputs[k % 4])["velocity"], range(80)))
    assert all(np.array_equal(value, wanted[k % 4]) for k, value in enumerate(found))


def test_a_damaged_library_is_compiled_again(built, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": "g++ -O1"}
    code = SAMPLE.format(folder=str(built.folder))
    assert run_python(code, **environment).returncode == 0
    (library,) = (tmp_path / "pyrexport").glob("executorch-*.so")
    whole = library.stat().st_size
    library.write_bytes(library.read_bytes()[:20_000])
    assert run_python(code, **environment).returncode == 0
    assert library.stat().st_size == whole
    assert not list((tmp_path / "pyrexport").glob("*.partial"))


def test_a_resume_over_another_program_is_refused(copy, refused, tmp_path):
    """A folder of samples is of one set of programs, wherever the weights lie."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    how = ("--prompts", prompts, "--schedule", "2-1", "-o", tmp_path / "many", "--quiet")
    assert CliRunner().invoke(main, ["sample", str(copy), *map(str, how)]).exit_code == 0
    with (copy / "stages.pte").open("ab") as file:
        file.write(b"\0")
    resign(copy)
    assert "other prompts or settings" in refused("sample", copy, *how)


def test_lowering_ppf_leaves_nothing_outside(make_checkpoint):
    """Its resize is a product for each axis; the stage takes about 15 s."""
    checkpoint = read_checkpoint(make_checkpoint("--kind", "ppf", "--no-text-encoder", "--no-vae"), resolution=SMALL)
    part = next(p for p in graph_parts(checkpoint, Options(), PORTABLE) if p.module.resize is not None)
    program = trace(part.module, part.inputs)
    for name, value in program.state_dict.items():
        program.state_dict[name] = torch.nn.Parameter(torch.zeros(value.shape), requires_grad=False)
    lowered = lower(part.name, program)
    targets = {node.target for node in lowered.graph.nodes if node.op == "call_function"}
    assert {str(target) for target in targets} <= {"executorch_call_delegate", "<built-in function getitem>"}


def test_inputs_that_do_not_fit_are_our_errors(engine):
    inputs = {name: np.zeros(spec["shape"], spec["dtype"]) for name, spec in engine.specs["inputs"].items()}
    assert engine.run(inputs)["velocity"].dtype == np.float32
    for name, value in inputs.items():
        for wrong in (value.astype(np.float64), value[..., :-1]):
            with pytest.raises(UsageError, match=f"input '{name}': expected float32"):
                engine.run(inputs | {name: wrong})
        with pytest.raises(UsageError, match=f"input '{name}' is missing"):
            engine.run({key: array for key, array in inputs.items() if key != name})
    with pytest.raises(UsageError, match="expected an array, found list"):
        engine.run(inputs | {"text": [0.0]})
    with pytest.raises(UsageError, match="unexpected input 'more'"):
        engine.run(inputs | {"more": np.zeros(1, np.float32)})


def test_a_closed_engine_says_so(built):
    entry = open_bundle(built.folder).manifest.graphs["stage1"]
    specs = {"inputs": entry.inputs, "outputs": entry.outputs}
    opened = ExecutorchEngine(built.folder / entry.file, "stage1", specs, EngineOptions())
    opened.close()
    opened.close()
    inputs = {name: np.zeros(spec["shape"], spec["dtype"]) for name, spec in specs["inputs"].items()}
    with pytest.raises(CheckFailed, match="closed"):
        opened.run(inputs)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_chain_of_the_documentation_is_the_runtimes(scale):
    """`docs/executorch.md` has it in 30 lines, for those who write it again in another language."""
    page = (ROOT / "docs" / "executorch.md").read_text()
    namespace: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], namespace)
    model = pyramid(resolution=SMALL)
    frequencies = [1.0, 0.1, 0.001]
    graphs = {f"stage{s.index}": {"inputs": {"latent": {"shape": [1, *s.latent]}}} for s in model.stages}
    manifest = {"model": {"clean_levels": [s.clean for s in model.stages]}, "graphs": graphs, "timestep_frequencies": frequencies}  # fmt: skip
    text, negative = np.full((2, 3), 0.5, np.float32), np.full((2, 3), -0.5, np.float32)

    def run(method, latent, features, text):
        return np.tanh(latent[..., ::-1] + features.sum() + np.float32(int(method[-1])) * text.mean())

    class Denoiser:
        def velocity(self, stage, latent, timestep, text):
            features = timestep_features(timestep, frequencies)
            return run(f"stage{stage}", latent[None], features, text[None])[0]

    schedule = Schedule("", spaced_levels(model, (3, 2, 2)), scale)
    wanted = sample(model, Denoiser(), text, schedule, negative_text=negative, seed=5)
    found = namespace["chain"](run, manifest, text, negative, schedule.levels, scale, 5)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # sums in another order, over 7 steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp16"), "takes its weights in fp32, found fp16"),
        (("--text-precision", "int8"), "takes its text encoder in fp32, found int8"),
        (("--vae-caches", "fp16"), "takes its caches in fp32, found fp16"),
    ],
)
def test_what_it_does_not_store_is_refused(tiny, refused, tmp_path, options, message):
    assert message in refused("build", tiny, "--target", "executorch", "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out.partial").exists()


def test_a_plan_and_a_provider_are_refused(tiny, built, refused, tmp_path):
    assert "measured when it is built" in refused("build", tiny, "--target", "executorch", "--plan")
    how = ("--prompt", "a", "-o", tmp_path / "a.npy", "--provider", "CUDAExecutionProvider")
    assert "no execution providers" in refused("sample", built.folder, *how)


def test_a_wheel_without_its_dependencies_runs_and_says_that_it_does_not_build(monkeypatch, tmp_path):
    from pyrexport.targets import executorch as target

    monkeypatch.delitem(sys.modules, "pyrexport.targets.executorch.build", raising=False)
    monkeypatch.delattr(target, "build", raising=False)
    monkeypatch.setitem(sys.modules, "executorch.devtools.backend_debug", None)
    with pytest.raises(UsageError, match="enough to run and not to build"):
        target.write_program("stages", [], tmp_path)


def test_the_portable_dialect_is_exact():
    """Against PyTorch's own functions; 2e-6 is a few roundings of float32."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 24, 48), torch.randn(48), torch.randn(48)

    def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)

    same(PORTABLE.layer_norm(48, 1e-6)(x, weight, bias), torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-6))
    same(PORTABLE.rms_norm(48, 1e-6)(x, weight), torch.nn.functional.rms_norm(x, (48,), weight, 1e-6))
    same(PORTABLE.gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))
    image = torch.randn(2, 6, 4, 5)
    same(PORTABLE.channel_mean(6)(image), image.mean(1, keepdim=True))
    assert torch.equal(PORTABLE.doubling()(image), torch.nn.functional.interpolate(image, scale_factor=2.0))
    angle = torch.randn(24, 6)
    turned = FUSED.rotation(4, 12)(x, angle.cos(), angle.sin())
    same(PORTABLE.rotation(4, 12)(x, angle.cos(), angle.sin()), turned)
    buckets, table = torch.randint(0, 5, (7, 7)), torch.randn(5, 3)
    length = buckets.shape[0]
    assert torch.equal(PORTABLE.bucket_bias(buckets, 5)(table, length), FUSED.bucket_bias(buckets, 5)(table, length))


@pytest.mark.parametrize("tokens", [24, 23])
def test_attention_in_pieces_is_the_same(monkeypatch, tokens):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 48), torch.randn(1, 31, 48), torch.randn(1, 31, 48)
    wanted = FUSED.attention(q, k, v, 4)
    torch.testing.assert_close(PORTABLE.attention(q, k, v, 4), wanted, rtol=2e-6, atol=2e-6)
    for nbytes in (31 * 4 * 24, 31 * 4 * 5, 1):
        monkeypatch.setattr(dialects, "SCORES_BYTES", nbytes)
        torch.testing.assert_close(PORTABLE.attention(q, k, v, 4), wanted, rtol=2e-6, atol=2e-6)


class StubTarget:
    """Takes programs, as executorch does, and stores their weights' sums; fails on the program that it is told to fail on."""

    FORM, GROUPING, SUFFIX, PRECISIONS = "torch", "methods", ".stub", ("fp32",)

    def __init__(self, fails_on: str = "") -> None:
        self.fails_on, self.written = fails_on, dict[str, list[str]]()

    def engine(self) -> tuple[str, str]:
        return "numpy", np.__version__

    def write_program(self, name: str, forms: Any, folder: Path) -> Any:
        if name == self.fails_on:
            raise RuntimeError("stopped")
        self.written[name] = [form.name for form in forms]
        weights = {key: form.program.state_dict[key].sum().item() for form in forms for key in form.placements}
        (folder / f"{name}{self.SUFFIX}").write_text(json.dumps(weights))
        for form in forms:
            yield Lowering(f"{form.name} done")

    def try_graph(self, file: Path, graph: str, specs: Any) -> int:
        if graph == self.fails_on:
            raise CheckFailed(f"{graph} does not run")
        return 1


def test_an_interrupted_build_of_programs_keeps_the_finished_ones(tiny, tmp_path):
    """And no weights that only the build needed are left in the bundle."""
    checkpoint, out = read_checkpoint(tiny, resolution=SMALL), tmp_path / "out"
    kept: list[str] = []
    reporter = Reporter()
    reporter.kept = kept.append  # type: ignore[method-assign]
    target: Any = StubTarget(fails_on="vae")
    with pytest.raises(RuntimeError, match="stopped"):
        build_bundle(checkpoint, "stub", target, out, reporter=reporter)
    assert not out.exists()
    assert target.written == {"stages": ["stage0", "stage1"], "text": ["text_64"]}
    target = StubTarget(fails_on="vae_next")
    with pytest.raises(CheckFailed, match="vae_next does not run"):
        build_bundle(checkpoint, "stub", target, out, reporter=reporter)
    assert target.written == {"vae": ["vae_first", "vae_next"]}
    target = StubTarget()
    build_bundle(checkpoint, "stub", target, out, reporter=reporter)
    assert target.written == {}, "what was lowered and failed in its run only is kept too"
    assert {graph.memory for graph in open_bundle(out).manifest.graphs.values()} == {1}
    assert {"graph stages", "graph text", "weights of transformer", "weights of text_encoder table"} <= set(kept)
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "stages.stub", "text.stub", "vae.stub", "weights.bin", "tokenizer.json"}
    sums = json.loads((out / "stages.stub").read_text())
    entry = checkpoint.transformer["blocks.0.ffn.net.2.weight"]
    weight = load_file(entry.file)[entry.name].astype(np.float32)
    assert sums["blocks.0.ffn_out.weight"] == pytest.approx(float(weight.sum()), rel=1e-4)  # sums in another order
