"""Checkpoint folders as they lie on people's disks."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import Files, read_checkpoint
from pyrexport.runtime.model.variants import choose_weights
from safetensors.torch import load_file, save_file
from support.building import ONE_STAGE

TRANSFORMER = "diffusion_pytorch_model"
LEAN = ("--no-vae", "--no-text-encoder", "--blocks", "1")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def as_variant(folder: Path, variant: str, *, keep: bool) -> None:
    """Give every component's weights a variant's name, shards and their index included; keep the plain ones or not."""
    for file in [*folder.glob("*/*.safetensors"), *folder.glob("*/*.safetensors.index.json")]:
        stem, dot, rest = file.name.partition(".")
        name = f"{stem}.{variant}{dot}{rest}" if rest == "safetensors" else f"{stem}.{rest[:-5]}.{variant}.json"
        text = file.read_bytes()
        if file.suffix == ".json":
            text = text.replace(b".safetensors", f".{variant}.safetensors".encode())
        (file.parent / name).write_bytes(text)
        if not keep:
            file.unlink()


@pytest.mark.parametrize("shards", [(), ("--shard-bytes", "20000")], ids=["whole", "sharded"])
def test_the_only_variant_there_is_read_and_a_plain_one_wins(make_checkpoint, tmp_path, shards):
    plain = make_checkpoint(*LEAN, *shards)
    expected = {name: (entry.shape, entry.offset) for name, entry in read_checkpoint(plain).transformer.items()}
    folder = Path(shutil.copytree(plain, tmp_path / "a"))
    as_variant(folder, "fp16", keep=True)
    assert not any(".fp16" in entry.file.name for entry in read_checkpoint(folder).transformer.values())
    asked = read_checkpoint(folder, files=Files(variant="fp16")).transformer
    shutil.rmtree(folder)
    shutil.copytree(plain, folder)
    as_variant(folder, "fp16", keep=False)
    (folder / "transformer" / f"._{TRANSFORMER}.bf16.safetensors").write_bytes(b"x")  # macOS
    for found in (asked, read_checkpoint(folder).transformer):
        assert {name: (entry.shape, entry.offset) for name, entry in found.items()} == expected
        assert all(".fp16.safetensors" in entry.file.name for entry in found.values())


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["m.safetensors", "m.fp16.safetensors"], None, "m.safetensors"),
        (["m.safetensors", "m.fp16.safetensors"], "fp16", "m.fp16.safetensors"),
        (["m.safetensors"], "fp16", "m.safetensors"),
        (["m.safetensors", "m.safetensors.index.json"], None, "m.safetensors"),
        (["m-00001-of-00002.safetensors", "m.safetensors.index.json"], None, "m.safetensors.index.json"),
        (
            ["m.fp16-00001-of-00002.safetensors", "m.safetensors.index.fp16.json"],
            None,
            "m.safetensors.index.fp16.json",
        ),
        (["m.fp16.safetensors.index.json"], "fp16", "m.fp16.safetensors.index.json"),
        (["._m.safetensors", "other.safetensors", "m.bin"], None, None),
        (["m.fp16.safetensors", "m.bf16.safetensors"], None, "bf16, fp16: choose one with --variant"),
        (["m.fp16.safetensors"], "bf16", "no weights of variant 'bf16': found fp16"),
    ],
)
def test_which_file_holds_the_weights(names, variant, chosen):
    if chosen is None or "." in chosen:
        assert choose_weights(names, "m", variant, "here") == chosen
    else:
        with pytest.raises(UsageError, match=re.escape(chosen)):
            choose_weights(names, "m", variant, "here")


def test_commands_take_a_variant_and_refuse_one_that_no_component_has(make_checkpoint, cli, refused, tmp_path):
    folder = Path(shutil.copytree(make_checkpoint(*LEAN), tmp_path / "a"))
    as_variant(folder, "fp16", keep=True)
    weights = folder / "transformer" / f"{TRANSFORMER}.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    document = json.loads(cli("inspect", folder, "--variant", "fp16", "--json").stdout)
    assert document["components"]["transformer"]["dtypes"] == ["F16"]
    words = "has no weights of variant 'fp61': found variants fp16; leave out --variant"
    assert words in refused("inspect", folder, "--variant", "fp61")
    for command in (
        ("build", folder, "--target", "ort", "-o", tmp_path / "out"),
        ("sample", folder, "--prompt", "a", "-o", tmp_path / "x.npy"),
        ("parity", "--record", tmp_path / "trace", "--reference", folder),
    ):
        assert words in refused(*command, "--variant", "fp61", "--quiet")


def test_a_bundle_has_no_variant(bundle, refused, tmp_path):
    assert "is a bundle, whose weights are fixed: give --variant" in refused("inspect", bundle, "--variant", "fp16")
    command = ("sample", bundle, "--prompt", "a", "-o", tmp_path / "x.npy", "--variant", "fp16")
    assert "is a bundle, whose weights are fixed: give --variant" in refused(*command)


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "pyramid.json",
    ],
)
def test_a_git_lfs_pointer_is_named(folder, refused, name):
    (folder / name).write_text(POINTER)
    assert f"{name} is a Git-LFS pointer, not the file itself: run 'git lfs pull'" in refused("inspect", folder)


def test_a_text_encoder_of_transformers_5_is_read(make_checkpoint, cli, tmp_path):
    """Its table is called by the name of its other owner; the bundle is the same, byte for byte."""
    plain = make_checkpoint(*ONE_STAGE)
    folder = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, weights)
    files = []
    for checkpoint, out in ((plain, tmp_path / "a"), (folder, tmp_path / "b")):
        built = cli("build", checkpoint, "--target", "ort", "-o", out, "--quiet", "--resolution", "17x64x64")
        assert built.exit_code == 0, built.output
        files.append(json.loads((out / "manifest.json").read_text())["files"])
    assert files[0] == files[1]
    from pyrexport.export.reference.reference import Reference

    ours, theirs = (Reference(read_checkpoint(path)).encode(["a cat"]) for path in (folder, plain))
    assert (torch.from_numpy(ours) == torch.from_numpy(theirs)).all()


def test_a_table_that_is_there_twice_is_there_once(make_checkpoint, cli, refused, tmp_path):
    """Where the two differ, either could be the one that was trained."""
    folder = Path(shutil.copytree(make_checkpoint(*ONE_STAGE), tmp_path / "checkpoint"))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    build = ("build", folder, "--target", "ort", "--quiet", "--resolution", "17x64x64", "-o")
    save_file(tensors, weights)
    assert cli(*build, tmp_path / "same").exit_code == 0
    tensors["encoder.embed_tokens.weight"][-1, 0] += 1
    save_file(tensors, weights)
    assert "to be 'shared.weight' again, found other values" in refused(*build, tmp_path / "other")


def test_a_slow_tokenizer_alone_is_refused_with_the_way_to_the_fast_one(folder, refused):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")
    line = refused("inspect", folder)
    assert "tokenizer.json is missing: expected the fast tokenizer of the text encoder, found spiece.model" in line
    place = f"'{folder / 'tokenizer'}'"
    assert f"AutoTokenizer.from_pretrained({place}).save_pretrained({place})" in line
