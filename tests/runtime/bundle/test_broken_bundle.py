"""A bundle that is not what its manifest says is refused."""

import json
import os
import re
from pathlib import Path

import onnx_ir as ir
import pytest
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.seen import Seen
from pyrexport.targets.links import relocated
from support.builders import resign


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


def not_numbers(folder: Path) -> None:
    """Every weight is a NaN."""
    file = folder / "weights.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    resign(folder)


def swap_graphs(folder: Path, a: str, b: str) -> None:
    graphs = json.loads((folder / "manifest.json").read_text())["graphs"]
    graphs[a]["file"], graphs[b]["file"] = graphs[b]["file"], graphs[a]["file"]
    resign(folder, graphs=graphs)


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
    monkeypatch.setattr(Seen, "_identity", lambda self, path: [path.name])  # as if nothing had been touched
    open_bundle(copy)
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
        (lambda folder: resign(folder, format=7), 2, "expected 6"),
        (lambda folder: resign(folder, extra=1), 2, "unknown field 'extra'"),
        (lambda folder: (folder / "manifest.json").write_text("{"), 2, "malformed"),
        (lambda folder: (folder / "manifest.json").unlink(), 2, "not a checkpoint|not a bundle|does not exist"),
        (lambda folder: resign(folder, engine={"name": "onnxruntime", "version": "99.0"}), 2, "upgrade it"),
        (lambda folder: resign(folder, target="gpu"), 2, "unknown target 'gpu'"),
        (
            lambda folder: resign(folder, files={"../weights.bin": {"sha256": "0" * 64, "bytes": 1}}),
            2,
            "impossible name",
        ),
    ],
)
def test_a_broken_bundle_is_refused(copy, cli, change, code, words):
    change(copy)
    result = cli("sample", copy, "--prompt", "a", "-o", copy.parent / "x.npz", "--quiet")
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not (copy.parent / "x.npz").exists()


@pytest.mark.parametrize("target", ["nowhere", "folder", "pipe"])
def test_a_link_to_what_is_no_plain_file_is_refused(copy, cli, target):
    (copy.parent / "folder").mkdir()
    os.mkfifo(copy.parent / "pipe")
    (copy / "weights.bin").unlink()
    (copy / "weights.bin").symlink_to(copy.parent / target)
    result = cli("inspect", copy, "--quiet")
    assert result.exit_code == 1
    assert (
        f"weights.bin: expected a plain file or a link to one, found a link to {copy.parent / target}" in result.stderr
    )


def test_a_flipped_byte_behind_a_link_is_found(copy, cli):
    target = copy.parent / "elsewhere"
    (copy / "weights.bin").rename(target)
    (copy / "weights.bin").symlink_to(target)
    assert cli("inspect", copy, "--quiet").exit_code == 0
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    result = cli("inspect", copy, "--quiet")
    assert (result.exit_code, "weights.bin is damaged" in result.stderr) == (1, True)


def test_what_downloads_and_file_systems_leave_behind_is_ignored_and_nothing_else(copy, cli):
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    for name in (
        "README.md",
        ".gitattributes",
        ".DS_Store",
        "._weights.bin",
        ".nfs00000000012a",
        "Thumbs.db",
        "LICENSE.txt",
        "Icon\r",
    ):
        (copy / name).write_bytes(b"x")
    for name in (".git", "@eaDir", "lost+found", ".ipynb_checkpoints"):
        (copy / name).mkdir()
    (copy / "desktop.ini").write_bytes(b"x")
    open_bundle(copy, verify=True)
    for name in ("stage7.onnx", "weights2.bin", "readme.md", ".hidden", "nfs1"):
        (copy / name).write_bytes(b"x")
        assert f"{name} is not part of the bundle" in cli("inspect", copy, "--quiet").stderr
        (copy / name).unlink()


def test_a_pointer_is_named_before_what_lies_beside_it(copy, refused):
    """In a clone, what is not part of the bundle is the smaller trouble."""
    (copy / "notes.txt").write_text("x")
    (copy / "weights.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\n")
    assert "weights.bin is a Git-LFS pointer" in refused("inspect", copy)


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_a_git_lfs_pointer_is_named(copy, refused, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n")
    assert f"{name} is a Git-LFS pointer, not the file itself: run 'git lfs pull'" in refused("inspect", copy)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda folder: swap_graphs(folder, "stage0", "stage1"), 2, "not the graph of its manifest"),
        (lambda folder: swap_graphs(folder, "vae_first", "vae_next"), 2, "not the graph of its manifest"),
        (lambda folder: ((folder / "tokenizer.json").write_text("{}"), resign(folder)), 2, "is not a tokenizer"),
        (lambda folder: ((folder / "stage2.onnx").write_bytes(b"x"), resign(folder)), 2, "cannot load stage2.onnx"),
        (out_of_range, 1, "failed in stage2.onnx"),
        (not_numbers, 1, "not finite"),
    ],
)
def test_a_bundle_that_was_signed_again_is_refused_before_a_wrong_video(copy, cli, change, code, words):
    change(copy)
    result = cli("sample", copy, "--prompt", "a", "-o", copy.parent / "x.mp4", "--quiet")
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert words in line
    assert not (copy.parent / "x.mp4").exists()


def test_weights_outside_the_folder_are_not_read(copy, cli):
    """ONNX Runtime sees to it, and SECURITY.md counts on it."""
    (copy.parent / "other.bin").write_bytes((copy / "weights.bin").read_bytes())
    graph = copy / "stage2.onnx"
    graph.write_bytes(relocated(graph.read_bytes(), {"weights.bin": "../other.bin"}))
    resign(copy)
    result = cli("sample", copy, "--prompt", "a", "-o", copy.parent / "x.npz", "--quiet")
    assert result.exit_code == 2
    assert "escapes model directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1
