"""Checkpoints that take components from a sibling, by path and hash."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyrexport.runtime.files import file_digest
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.siblings import folder_digest

SHARED = ("vae", "text_encoder", "tokenizer")


def describe(checkpoint: Path, **components: Any) -> None:
    """Write what a checkpoint's `pyramid.json` says of its components."""
    file = checkpoint / "pyramid.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"components": components}))


@pytest.fixture
def pair(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and one that has a transformer of its own and takes all else from the first."""
    whole, lean = tmp_path / "whole", tmp_path / "lean"
    shutil.copytree(tiny, whole)
    shutil.copytree(tiny, lean)
    for name in SHARED:
        shutil.rmtree(lean / name)
    describe(
        lean,
        **{name: {"path": f"../whole/{name}", "sha256": folder_digest(whole / name, file_digest)} for name in SHARED},
    )
    return whole, lean


def test_a_bundle_is_that_of_a_checkpoint_that_has_them_all(pair, bundle, cli, tmp_path):
    """And holds everything itself; the reference reads the sibling's too."""
    whole, lean = pair
    out = tmp_path / "bundle"
    result = cli("build", lean, "--target", "ort", "--resolution", "17x64x64", "-o", out, "--quiet")
    assert result.exit_code == 0, result.output
    for file in bundle.iterdir():
        if file.name != "manifest.json":
            assert (out / file.name).read_bytes() == file.read_bytes()
    written, expected = (json.loads((folder / "manifest.json").read_text())["provenance"] for folder in (out, bundle))
    assert written["checkpoint"] == expected["checkpoint"]
    result = cli("parity", out, "--reference", lean, "--prompt", "a cat", "--schedule", "1-1-1", "--quiet")
    assert result.exit_code == 0, result.output
    shutil.rmtree(whole)
    assert cli("sample", out, "--prompt", "a cat", "--schedule", "1-1-1", "-o", tmp_path / "cat.npz").exit_code == 0


def test_a_sibling_may_be_reached_by_a_link(pair, tmp_path):
    """The checkpoint's own folder is what is looked around, wherever it was opened from."""
    _, lean = pair
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(lean)
    assert set(read_checkpoint(link).components) == {"transformer", "vae", "text_encoder"}


def sibling(whole: Path, **fields: Any) -> dict[str, Any]:
    return {"path": "../whole/vae", "sha256": folder_digest(whole / "vae", file_digest)} | fields


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"sha256": "0" * 64}, 'whole/vae, found "0000'),
        ({"path": "../missing/vae"}, "fetch the checkpoint that it is of"),
        ({"path": "../whole/vae/config.json"}, "expected a folder"),
        ({"path": "../../vae"}, "links followed"),
        ({"path": ".."}, "links followed"),
        ({"path": "../leading-out"}, "links followed"),
        ({"path": 3}, "'path'"),
        ({"size": 1}, "unknown field 'size'"),
    ],
)
def test_what_is_not_the_siblings_is_refused(pair, refused, tmp_path, fields, line):
    whole, lean = pair
    (tmp_path / "leading-out").symlink_to(tmp_path.parent)
    describe(lean, vae=sibling(whole, **fields))
    assert line in refused("inspect", lean)


def test_an_absolute_path_a_second_copy_and_another_component_are_refused(pair, refused):
    whole, lean = pair
    describe(lean, vae=sibling(whole, path=str(whole / "vae")))
    assert "a relative path inside" in refused("inspect", lean)
    describe(lean, scheduler=sibling(whole))
    assert "unknown field 'scheduler'" in refused("inspect", lean)
    describe(lean, vae=sibling(whole))
    shutil.copytree(whole / "vae", lean / "vae")
    assert "keep one of the two" in refused("inspect", lean)


def test_a_changed_file_of_a_sibling_is_noticed(pair, refused):
    whole, lean = pair
    assert read_checkpoint(lean).vae
    file = whole / "vae" / "config.json"
    file.write_text(file.read_text() + "\n")
    assert "components: vae: field 'sha256'" in refused("inspect", lean)
