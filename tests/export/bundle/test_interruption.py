"""Builds that are killed, stopped, or out of room, and what a rerun keeps."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from kill_build import kill_once
from pyrexport.export.bundle import output, work
from pyrexport.export.lowering import forms
from pyrexport.runtime.bundle.opening import open_bundle
from safetensors.numpy import load_file, save_file


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_replacement_that_was_interrupted_is_undone(tiny, copy, refused):
    copy.rename(copy.with_name(".bundle.replaced"))
    assert "give --force" in refused("build", tiny, "--target", "ort", "-o", copy)
    open_bundle(copy)


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_or_a_whole_bundle_and_the_rerun_succeeds(make_checkpoint, tmp_path):
    """One kill, of which `scripts/kill_build.py` does more: half a minute."""
    kill_once(make_checkpoint("--no-vae", "--blocks", "1"), tmp_path / "bundle", 6)


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
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--no-vae", "--blocks", "1"), folder)
    file = folder / "text_encoder" / "model.safetensors"
    real = work.write_component

    def write(tensors, places, component, *others):
        real(tensors, places, component, *others)
        if component == "transformer":
            save_file(load_file(file), file, metadata={"format": "pt", "more": 64 * "x"})

    monkeypatch.setattr(work, "write_component", write)
    monkeypatch.setattr(forms, "export_onnx", lambda *arguments: pytest.fail("not refused before graphs"))
    line = refused("build", folder, "--target", "ort", "-o", tmp_path / "out", "--quiet")
    assert "text_encoder" in line
    assert "changed during the build" in line
    assert not (tmp_path / "out").exists()


def test_a_rerun_keeps_the_finished_parts(make_checkpoint, cli, tmp_path, monkeypatch):
    folder = make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1")
    real, made = forms.export_onnx, []

    def export(*arguments, **options):
        if len(made) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(arguments[-1])
        return real(*arguments, **options)

    monkeypatch.setattr(forms, "export_onnx", export)
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
    state = tmp_path / ".c.partial.journal.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"program stage1": [1]}))
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "c", "--quiet").exit_code == 0
    assert made[3:] == ["stage0", "stage1", "stage2", "stage1"]
    assert {path.name for path in tmp_path.iterdir()} == {"again", "b", "c"}
    assert (tmp_path / "b" / "weights.bin").read_bytes() == (tmp_path / "c" / "weights.bin").read_bytes()


def test_what_another_checkpoints_interrupted_build_left_is_removed(make_checkpoint, cli, tmp_path):
    """Its tokenizer too, where this one has no text encoder."""
    folder = make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1")
    (tmp_path / "b.partial").mkdir()
    for name in (output.STATE_FILE, "tokenizer.json"):
        (tmp_path / "b.partial" / name).write_text("{}")
    assert cli("build", folder, "--target", "ort", "-o", tmp_path / "b", "--quiet").exit_code == 0
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    assert cli("inspect", tmp_path / "b", "--verify", "--quiet").exit_code == 0
