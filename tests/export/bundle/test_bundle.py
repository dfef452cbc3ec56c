"""Bundles: what is built, how it is sampled, and how a broken one is refused."""

import errno
import json
import os
import random
import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pyrexport
import pytest
from kill_build import kill_once
from pyrexport.export import weights
from pyrexport.export.bundle.parts import Options, graph_parts
from pyrexport.export.families.layers import sources_of
from pyrexport.export.reference.reference import Reference
from pyrexport.export.weights.stream import plan_weights, write_component
from pyrexport.runtime.bundle.manifest import parse_manifest, signed
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.errors import PyrexportError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.pipeline.text import clean_prompt
from pyrexport.runtime.proof.parity import distance
from safetensors.numpy import load_file, save_file
from support.builders import resign


@pytest.fixture
def copy(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    return folder


def test_a_bundle_holds_what_its_manifest_lists(bundle, tiny):
    document = json.loads((bundle / "manifest.json").read_text())
    assert {path.name for path in bundle.iterdir()} == {*document["files"], "manifest.json"}
    assert set(document["graphs"]) == {"stage0", "stage1", "stage2", "text_64", "vae_first", "vae_next"}
    assert document["model"]["schedules"].keys() == json.loads((tiny / "pyramid.json").read_text())["schedules"].keys()
    assert document["target"] == "ort"
    options = {"precision": "fp32", "text_precision": "fp32", "vae_tile": None, "vae_caches": "float32"}
    assert document["provenance"]["options"] == options | {"layout": "", "compute_capabilities": []}


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


def test_weights_do_not_depend_on_the_size_of_the_pieces_they_are_read_in(tiny, tmp_path, monkeypatch):
    """In 16 bits and by one row at a time, too: a piece of one row has the strides of the whole matrix."""
    checkpoint = read_checkpoint(tiny)
    parts = graph_parts(checkpoint, Options("bf16"))
    plan = plan_weights([source for part in parts for source in sources_of(part.module).values()])
    written = []
    for chunk in (weights.CHUNK, 1024, 260):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        file = tmp_path / str(chunk)
        file.touch()
        for component in checkpoint.components:
            write_component(checkpoint, plan, component, file, lambda count: None)
        written.append(file.read_bytes())
    assert written[0] == written[1] == written[2]
    assert len(written[0]) > 10**5


def test_sampling_a_bundle_equals_the_reference(bundle, tiny, cli, tmp_path):
    for model, name in ((bundle, "ours.npy"), (tiny, "theirs.npy")):
        result = cli(
            "sample", model, "--prompt", "  a &amp;amp; b\n cat ", "-o", tmp_path / name, "--seed", 3, "--quiet"
        )
        assert result.exit_code == 0, result.output
    ours, theirs = (np.load(tmp_path / name) for name in ("ours.npy", "theirs.npy"))
    assert distance(ours, theirs).relative_l2 < 1e-5  # two blocks: far below the tolerance of 1e-4


def test_the_api_and_the_command_line_agree(bundle, cli, tmp_path):
    steps = []
    with pyrexport.load(bundle, resident=True) as pipeline:
        result = pipeline("a cat", seed=1, schedule="1-1-1", callback=steps.append)
        latent_only = pipeline("a cat", seed=1, schedule="1-1-1", output_type="latent")
        embeds = pipeline(prompt_embeds=pipeline.encode("a cat"), seed=1, schedule="1-1-1", output_type="latent")
    assert [step.stage for step in steps] == [2, 1, 0]
    assert result.frames.shape == (17, 64, 64, 3)
    assert latent_only.frames is None
    assert np.array_equal(result.latents, latent_only.latents)
    assert np.array_equal(result.latents, embeds.latents)
    assert result.timings.denoise <= result.timings.total
    out = tmp_path / "a.npz"
    arguments = [
        "--seed",
        1,
        "--schedule",
        "1-1-1",
        "--save-latents",
        tmp_path / "a.npy",
        "--grid",
        "--quiet",
        "--json",
    ]
    done = cli("sample", bundle, "--prompt", "a cat", "-o", out, *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == [str(out), str(tmp_path / "a.png"), str(tmp_path / "a.npy")]
    assert np.array_equal(np.load(out)["frames"], result.frames)
    assert np.array_equal(np.load(tmp_path / "a.npy"), result.latents)


def test_a_file_of_prompts_goes_on_where_it_stopped(bundle, cli, refused, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    out = tmp_path / "clips"
    arguments = ["sample", bundle, "--prompts", prompts, "-o", out, "--schedule", "1-1-1", "--quiet", "--json"]
    assert len(json.loads(cli(*arguments).stdout)["samples"]) == 2
    kept = (out / "0000.mp4").stat().st_mtime_ns
    (out / "0001.mp4").unlink()
    samples = json.loads(cli(*arguments).stdout)["samples"]
    assert [(sample["prompt"], sample.get("kept", False)) for sample in samples] == [("a cat", True), ("a dog", False)]
    assert (out / "0000.mp4").stat().st_mtime_ns == kept
    assert "other prompts or settings" in refused(*arguments, "--seed", 9)
    prompts.write_bytes("\ufeffa cat\n\na dog\n".encode())  # some editors put a mark at the start
    assert all(sample["kept"] for sample in json.loads(cli(*arguments).stdout)["samples"])
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    resign(other)
    moved = json.loads((out / "samples.json").read_text()) | {"model": str(other.resolve())}
    (out / "samples.json").write_text(json.dumps(moved | {"weights": "0" * 64}))
    assert "other prompts or settings" in refused("sample", other, *arguments[2:])


def test_without_pyav_frames_go_elsewhere(bundle, cli, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.cli.sample.has_video_writer", lambda: False)
    line = refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "a.mp4")
    assert "pip install 'pyrexport[video]', or give a folder for PNG files or a .npz" in line
    assert cli("sample", bundle, "--prompt", "a", "-o", tmp_path / "frames", "--quiet").exit_code == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 17
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "frames" / "00000.png").write_text("precious")
    assert "is not empty" in refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "frames")
    assert (tmp_path / "frames" / "00000.png").read_text() == "precious"


def test_one_engine_is_open_at_a_time_unless_resident(bundle):
    for resident, most in ((False, 1), (True, 5)):
        with pyrexport.load(bundle, resident=resident) as pipeline:
            seen = []
            pipeline("a", schedule="1-1-1", callback=lambda step, p=pipeline, s=seen: s.append(len(p._engines)))
            assert max(seen) == min(most, 4) if resident else max(seen) == 1
        assert pipeline._engines == {}


def test_prompts_are_cleaned_as_diffusers_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in ("", "  a\n\tb ", "&lt;b&gt; &amp;amp;lt;", "l’été â€œquotedâ€\x9d", "漢字　かな", "a" * 3000):
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_long_empty_and_foreign_prompts_encode_as_the_reference_does(bundle, tiny):
    reference = Reference(read_checkpoint(tiny))
    prompts = ["", "a " * 500, "漢字", "🎈 balloon"]
    expected = reference.encode(prompts)
    with pyrexport.load(bundle, resident=True) as pipeline:
        for prompt, embeds in zip(prompts, expected, strict=True):
            assert distance(pipeline.encode(prompt), embeds).relative_l2 < 1e-5, prompt


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


def test_an_output_in_the_way_is_refused_and_a_bundle_replaced_by_force(tiny, copy, cli, refused, tmp_path):
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "is not a bundle" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert "unknown target 'tpu': expected one of executorch, ort" in refused(
        "build", tiny, "--target", "tpu", "-o", tmp_path / "x"
    )
    assert "does not exist" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "no" / "x")
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", tmp_path / ".")
    (tmp_path / "link").symlink_to(copy)
    assert "symbolic link" in refused("build", tiny, "--target", "ort", "-o", tmp_path / "link", "--force")
    assert "cannot be a bundle" in refused("build", tiny, "--target", "ort", "-o", "/")


def test_somebody_elses_folders_are_left_alone(make_checkpoint, cli, refused, tmp_path, monkeypatch):
    from pyrexport.export import work as module

    folder = make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1")
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.txt").write_text("x")
    (tmp_path / ".b.replaced").mkdir()
    (tmp_path / ".b.replaced" / "thesis.txt").write_text("x")
    assert "was not made by a build" in refused("build", folder, "--target", "ort", "-o", tmp_path / "a", "--quiet")
    assert (tmp_path / "a.partial" / "thesis.txt").exists()
    real = module.export_onnx

    def export(*arguments, **options):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "thesis.txt").write_text("x")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "export_onnx", export)
    assert "appeared during the build" in refused("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet")
    assert (tmp_path / "b" / "thesis.txt").exists()
    (tmp_path / "b" / "thesis.txt").unlink()
    (tmp_path / "b").rmdir()
    monkeypatch.setattr(module, "export_onnx", None)  # every graph is kept
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    assert (tmp_path / ".b.replaced" / "thesis.txt").exists()


def test_a_replacement_that_was_interrupted_is_undone(tiny, copy, refused):
    copy.rename(copy.with_name(".bundle.replaced"))
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", copy)
    open_bundle(copy)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_or_a_whole_bundle_and_the_rerun_succeeds(make_checkpoint, tmp_path):
    """Two kills, of which `scripts/kill_build.py` does more: about a minute."""
    folder = make_checkpoint("--no-vae", "--blocks", "1")
    chance = random.Random(1)
    for index in range(2):
        output = tmp_path / str(index) / "bundle"
        output.parent.mkdir()
        kill_once(folder, output, chance.uniform(4, 12))


def test_a_disk_that_is_or_becomes_full_ends_a_build_in_one_line(make_checkpoint, cli, tmp_path, monkeypatch):
    out, checkpoint = tmp_path / "out", make_checkpoint("--kind", "plain", "--no-vae", "--no-text-encoder")
    command = ("build", checkpoint, "--target", "ort", "-o", out, "--quiet", "--resolution", "17x64x64")
    with monkeypatch.context() as context:
        context.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        result = cli(*command)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "1,000 bytes free" in result.stderr
    real, left = os.pwrite, [10]

    def pwrite(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as context:
        context.setattr("os.pwrite", pwrite)
        result = cli(*command)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "make room and run again" in result.stderr
    assert not out.exists()
    assert cli(*command).exit_code == 0


def test_what_changes_during_a_build_is_noticed(make_checkpoint, refused, tmp_path, monkeypatch):
    """A text encoder that is replaced while the transformer is written would be read at another file's offsets."""
    from pyrexport.export import work as module

    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--no-vae", "--blocks", "1"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    real = module.write_component

    def write(checkpoint, plan, component, *others):
        real(checkpoint, plan, component, *others)
        if component == "transformer":
            save_file(load_file(file), file, metadata={"format": "pt", "more": 64 * "x"})

    monkeypatch.setattr(module, "write_component", write)
    monkeypatch.setattr(module, "export_onnx", lambda *arguments: pytest.skip("not refused before graphs"))
    line = refused("build", folder, "--target", "ort", "-o", tmp_path / "out", "--quiet")
    assert "text_encoder" in line
    assert "changed during the build" in line
    assert not (tmp_path / "out").exists()


def test_values_that_storage_cannot_hold(make_checkpoint, refused, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1"), folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.weight"][3, 5] = 70000
    save_file(tensors, file)
    line = refused("build", folder, "--target", "ort", "-o", tmp_path / "out", "--precision", "fp16", "--quiet")
    assert "'blocks.0.attn1.to_q.weight' holds values that are not finite in float16" in line
    for options in (["--text-precision", "int8"], ["--vae-tile", "16x16"], ["--vae-caches", "fp16"]):
        assert "says nothing" in refused("build", folder, "--target", "ort", "-o", tmp_path / "x", *options).replace(
            "say nothing", "says nothing"
        )


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_rerun_keeps_the_finished_parts(make_checkpoint, cli, tmp_path, monkeypatch):
    from pyrexport.export import work as module

    folder = make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1")
    real, made = module.export_onnx, []

    def export(*arguments, **options):
        if len(made) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(arguments[-1])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "export_onnx", export)
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 130
    assert not (tmp_path / "b").exists()
    (tmp_path / "again").touch()
    weights = tmp_path / "b.partial" / "weights.bin"
    damaged = bytearray(weights.read_bytes())
    damaged[100] ^= 255
    weights.write_bytes(damaged)
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    assert made == ["stage0", "stage1", "stage2"]
    open_bundle(tmp_path / "b", verify=True)
    with monkeypatch.context() as patched:
        patched.setattr("pyrexport.export.bundle.output.sync_folder", stop)  # just before the last renames
        assert cli("build", folder, "--target", "ort", "-o", tmp_path / "c", "--quiet").exit_code == 130
    state = tmp_path / ".c.partial.parts.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"graph stage1": [1]}))
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "c", "--quiet").exit_code == 0
    assert made[3:] == ["stage0", "stage1", "stage2", "stage1"]
    assert {path.name for path in tmp_path.iterdir()} == {"again", "b", "c"}
    assert (tmp_path / "b" / "weights.bin").read_bytes() == (tmp_path / "c" / "weights.bin").read_bytes()


@pytest.mark.parametrize("name", ["weights.bin", "stage1.onnx", "vae_next.onnx", "tokenizer.json", "manifest.json"])
def test_a_flipped_byte_is_found(copy, cli, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    for command in (["sample", copy, "--prompt", "a", "-o", copy.parent / "x.npz"], ["inspect", copy]):
        result = cli(*command, "--quiet")
        assert result.exit_code in (1, 2)
        assert name in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_verify_finds_what_size_and_time_do_not_show(copy, cli, monkeypatch):
    from pyrexport.runtime import bundle as module

    open_bundle(copy)
    monkeypatch.setattr(module._Seen, "holds", lambda *arguments: True)  # as if nothing had been touched
    data = bytearray((copy / "weights.bin").read_bytes())
    data[0] ^= 1
    (copy / "weights.bin").write_bytes(data)
    assert cli("inspect", copy, "--quiet").exit_code == 0
    assert cli("inspect", copy, "--verify", "--quiet").exit_code == 1


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda folder: (folder / "stage1.onnx").unlink(), 1, "stage1.onnx is missing"),
        (lambda folder: (folder / "notes.txt").write_text("x"), 1, "notes.txt is not part of the bundle"),
        (lambda folder: resign(folder, format=2), 2, "expected 1"),
        (lambda folder: resign(folder, extra=1), 2, "unknown field 'extra'"),
        (lambda folder: (folder / "manifest.json").write_text("{"), 2, "malformed"),
        (lambda folder: (folder / "manifest.json").unlink(), 2, "not a checkpoint|not a bundle|does not exist"),
        (lambda folder: resign(folder, engine={"name": "onnxruntime", "version": "99.0"}), 2, "upgrade it"),
        (lambda folder: resign(folder, target="gpu"), 2, "unknown target 'gpu'"),
        (lambda folder: resign(folder, files={"../weights.bin": {"sha256": "0" * 64, "bytes": 1}}), 2, "impossible name"),
    ],
)  # fmt: skip
def test_a_broken_bundle_is_refused(copy, cli, change, code, words):
    import re

    change(copy)
    result = cli("sample", copy, "--prompt", "a", "-o", copy.parent / "x.npz", "--quiet")
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not (copy.parent / "x.npz").exists()


def test_a_link_in_place_of_a_file_is_refused(copy, cli):
    target = copy.parent / "elsewhere.bin"
    (copy / "weights.bin").rename(target)
    (copy / "weights.bin").symlink_to(target)
    assert "not a plain file" in cli("inspect", copy, "--quiet").stderr


def mutate(value, chance: random.Random):
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {chance.choice(["x", "", "../a", key + "x"]): value[key]}
        return value | {key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        return [*value[:index], mutate(value[index], chance), *value[index + 1 :]]
    odd = [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1e308,
        float("nan"),
        "",
        "x" * 300,
        "../../etc/passwd",
        [],
        {},
        [[]],
        0.5,
        "\ud800",
    ]
    return chance.choice(odd)


def test_ten_thousand_fuzzed_manifests_are_read_or_refused(bundle):
    """Signed again, so that only the checks stand between them and the runtime: about 15 s."""
    original = json.loads((bundle / "manifest.json").read_text())
    chance, accepted = random.Random(0), 0
    for _ in range(10_000):
        document = mutate(original, chance)
        if not isinstance(document, dict):
            continue
        with suppress(PyrexportError):  # anything else fails the test
            parse_manifest(signed(document), "manifest.json")
            accepted += 1
    # Provenance, prompts and hashes may say anything; the rest may not.
    assert accepted < 6_000


def test_a_provider_that_is_not_there(bundle, tiny, refused, tmp_path):
    arguments = ("--prompt", "a", "-o", tmp_path / "x.npy", "--provider", "CUDAExecutionProvider", "--quiet")
    assert "has no 'CUDAExecutionProvider' here: expected one of" in refused("sample", bundle, *arguments)
    assert "are for bundles" in refused("sample", tiny, *arguments)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_to_the_api_are_refused(bundle):
    with pyrexport.load(bundle) as pipeline:
        for arguments in ({}, {"prompt": "a", "prompt_embeds": np.zeros((64, 32), np.float32)}, {"prompt": "a", "output_type": "pil"}, {"prompt": "a", "seed": -1}, {"prompt_embeds": np.zeros((3, 3), np.float32)}, {"prompt": "a", "schedule": "x"}, {"prompt": ["a", "b"]}, {"prompt": "a", "seed": 1.5}, {"prompt": "a", "latents": np.zeros((16, 2, 2, 2), complex)}, {"prompt": "a", "latents": [0.0]}, {"prompt": "a", "guidance_scale": 3.0, "negative_prompt": "b", "negative_prompt_embeds": np.zeros((64, 32), np.float32)}):  # fmt: skip
            with pytest.raises(PyrexportError):
                pipeline(**arguments)
        with pytest.raises(PyrexportError, match="expected float32"):
            pipeline.run("stage2", {"latent": np.zeros((1, 16, 2, 2, 2)), "timestep_features": np.zeros((1, 256), np.float32), "text": np.zeros((1, 64, 32), np.float32)})  # fmt: skip
        with pytest.raises(PyrexportError, match="no graph"):
            pipeline.run("stage9", {})


@pytest.mark.parametrize("threads", [-1, 1.5, 10**12])
def test_impossible_threads(bundle, refused, tmp_path, threads):
    with pytest.raises(PyrexportError, match="threads is a whole number"):
        pyrexport.load(bundle, threads=threads)
    refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "a.npy", "--threads", threads)


def test_bench_compares_a_bundle_with_its_own_checkpoint_alone(bundle, tiny, make_checkpoint, refused):
    plain = make_checkpoint("--kind", "plain", "--resolution", "17x64x64")
    assert "is another model" in refused("bench", bundle, "--reference", plain, "--quiet")
    assert "not a checkpoint" in refused("bench", bundle, "--reference", bundle, "--quiet")
    assert "unknown schedule" in refused("bench", bundle, "--reference", tiny, "--schedule", "fast", "--quiet")


def test_parts_that_are_absent(make_bundle, cli, refused, tmp_path):
    folder = make_bundle("--no-vae", "--no-text-encoder", "--blocks", "1")
    assert "no text encoder" in refused("sample", folder, "--prompt", "a", "-o", tmp_path / "a.npy", "--quiet")
    with pyrexport.load(folder) as pipeline:
        embeds = np.zeros((64, 32), np.float32)
        assert pipeline(prompt_embeds=embeds, output_type="latent").latents.shape == (16, 5, 8, 8)
    document = json.loads((folder / "manifest.json").read_text())
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "manifest.json").write_text(json.dumps(signed({k: v for k, v in document.items() if k != "vae"})))
    assert json.loads(cli("inspect", bare, "--json", "--quiet").stdout)["vae"] is None
    with pyrexport.load(folder) as pipeline, pytest.raises(PyrexportError, match="no VAE"):
        pipeline(prompt_embeds=embeds)


def test_bench_reports_every_graph(bundle, cli):
    document = json.loads(cli("bench", bundle, "--runs", 2, "--quiet", "--json").stdout)
    assert set(document["graphs"]) == {"stage0", "stage1", "stage2", "vae_first", "vae_next"}
    assert document["graphs"]["stage2"]["calls"] == 2
    assert 0 <= document["glue_share"] <= 1
    assert document["peak_anonymous_bytes"] > 0


def test_inspect_shows_a_bundle(bundle, cli):
    document = json.loads(cli("inspect", bundle, "--json", "--quiet").stdout)
    assert document["precision"] == {"storage": "fp32", "text": "fp32", "compute": "fp32"}
    assert document["stages"][0]["tokens"] == 80
    assert document["files"]["weights.bin"] == (bundle / "weights.bin").stat().st_size
    assert Path(document["model"]) == bundle


def out_of_range(folder: Path) -> None:
    """A graph that loads, and fails when it runs."""
    model = ir.load(folder / "stage2.onnx")
    (output,) = model.graph.outputs
    flat = ir.node("Reshape", [output, ir.Value(name="all", const_value=ir.tensor([-1], name="all"))])
    place = ir.Value(name="place", const_value=ir.tensor([10**6], name="place"))
    taken = ir.node("Gather", [flat.outputs[0], place])
    added = ir.node("Add", [output, taken.outputs[0]])
    for value in (flat.inputs[1], place):
        model.graph.register_initializer(value)
    model.graph.extend([flat, taken, added])
    added.outputs[0].shape, added.outputs[0].type = output.shape, output.type
    output.name, added.outputs[0].name = "velocity_before", output.name
    model.graph.outputs[0] = added.outputs[0]
    ir.save(model, folder / "stage2.onnx")
    resign(folder)


def swap_graphs(folder: Path, a: str, b: str) -> None:
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    graphs[a]["file"], graphs[b]["file"] = graphs[b]["file"], graphs[a]["file"]
    resign(folder, graphs=graphs)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda folder: swap_graphs(folder, "stage0", "stage1"), 2, "not the graph of its manifest"),
        (lambda folder: swap_graphs(folder, "vae_first", "vae_next"), 2, "not the graph of its manifest"),
        (lambda folder: ((folder / "tokenizer.json").write_text("{}"), resign(folder)), 2, "is not a tokenizer"),
        (lambda folder: ((folder / "stage2.onnx").write_bytes(b"x"), resign(folder)), 2, "cannot load stage2.onnx"),
        (out_of_range, 1, "failed in stage2.onnx"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"\xff" * (folder / "weights.bin").stat().st_size) and resign(folder), 1, "not finite"),
    ],
)  # fmt: skip
def test_a_bundle_that_was_signed_again_is_refused_before_a_wrong_video(copy, cli, change, code, words):
    change(copy)
    result = cli("sample", copy, "--prompt", "a", "-o", copy.parent / "x.mp4", "--quiet")
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert words in line
    assert not (copy.parent / "x.mp4").exists()
