"""A bundle of ExecuTorch programs: what it holds, and running it without torch, damaged, or on a broken machine."""

import json
import os
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT
from pyrexport.cli import main
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.files import cache_folder
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.targets.executorch.compile import library_file
from pyrexport.targets.executorch.session import ExecutorchEngine
from support.builders import resign

pytest.importorskip("executorch")


@pytest.mark.slow
def test_xnnpack_takes_all_of_every_method(built):
    """In one piece, its one block included. The build takes about two minutes."""
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
        weight = np.frombuffer(source.read(entry.nbytes), entry.dtype)
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
    install = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "numpy", "tokenizers", "ftfy", "click", "rich"], check=True, capture_output=True)
    subprocess.run([*install, "--no-deps", "executorch"], check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(linked(tmp_path))!r})" + SAMPLE.format(folder=str(built.folder))
    entry = tmp_path / "links" / "pyrexport-0.dist-info"  # entry points are found through metadata
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: pyrexport\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[pyrexport.targets]\nexecutorch = pyrexport.targets.executorch:TARGET\n")
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
    tensors = engine.spec.inputs
    inputs = [{t.name: generator.standard_normal(t.shape, np.float32) for t in tensors} for _ in range(4)]
    wanted = [engine.run(values)["velocity"] for values in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: engine.run(inputs[k % 4])["velocity"], range(80)))
    assert all(np.array_equal(value, wanted[k % 4]) for k, value in enumerate(found))


def test_a_damaged_library_is_compiled_again(built, tmp_path):
    with library_file() as kept:
        library = Path(shutil.copytree(cache_folder(), tmp_path / "pyrexport")) / kept.name
    whole = library.stat().st_size
    library.write_bytes(library.read_bytes()[:20_000])
    assert run_python(SAMPLE.format(folder=str(built.folder)), XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    assert library.stat().st_size == whole
    assert not list((tmp_path / "pyrexport").glob("*.partial"))


def test_a_provider_is_refused(built, refused, tmp_path):
    how = ("--prompt", "a", "-o", tmp_path / "a.npy", "--provider", "CUDAExecutionProvider")
    assert "no option 'provider'" in refused("sample", built.folder, *how)


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


def test_inputs_that_do_not_fit_are_our_errors(engine):
    inputs = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in engine.spec.inputs}
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
    entry = open_bundle(built.folder).manifest.graphs[stage_key(1)]
    opened = ExecutorchEngine(built.folder / entry.file, entry.spec, EngineOptions())
    opened.close()
    opened.close()
    inputs = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in entry.spec.inputs}
    with pytest.raises(CheckFailed, match="closed"):
        opened.run(inputs)
