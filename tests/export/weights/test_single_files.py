"""Components as one repackaged file, in Wan's names: the same weights, from wherever they come."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from pyrexport.export.weights.edits import read_tensor
from pyrexport.export.weights.names import to_diffusers
from pyrexport.runtime.model.checkpoint import Checkpoint, Files, read_checkpoint
from safetensors.torch import load_file, save_file
from support.builders import SMALL
from support.originals import original_text, original_transformer, original_vae
from support.stopping import weights_of

Make = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def full(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose VAE has Wan's own number of blocks: the conversion of names knows no other."""
    import shutil

    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    shutil.copytree(make_checkpoint(), folder)
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    return folder


def opened(folder: Path, files: Files | None = None) -> Checkpoint:
    """A checkpoint, some components from files of their own."""
    return read_checkpoint(folder, resolution=SMALL, rename=to_diffusers, files=files or Files())


def repackaged(folder: Path, component: str, rename: Callable[[str], str], out: Path) -> Path:
    """One file with a component's tensors under other names."""
    (file,) = (folder / component).glob("*.safetensors")
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, out)
    return out


CASES: dict[str, tuple[str, Callable[[str], str]]] = {
    "transformer": ("transformer", original_transformer),
    "transformer of ComfyUI": ("transformer", lambda name: f"model.diffusion_model.{original_transformer(name)}"),
    "transformer, its names kept": ("transformer", lambda name: f"diffusion_model.{name}"),
    "text encoder": ("text_encoder", original_text),
    "VAE": ("vae", original_vae),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights(full: Path, tmp_path: Path, case: str) -> None:
    component, rename = CASES[case]
    file = repackaged(full, component, rename, tmp_path / "one.safetensors")
    ours, expected = (getattr(c, component) for c in (opened(full, Files(**{component: file})), opened(full)))
    assert ours.keys() == expected.keys()
    for name, entry in ours.items():
        assert entry.file == file
        assert torch.equal(read_tensor(entry), read_tensor(expected[name])), name


def test_a_tokenizer_among_the_weights_is_left_out(full: Path, tmp_path: Path) -> None:
    (file,) = (full / "text_encoder").glob("*.safetensors")
    with_model = load_file(file) | {"spiece_model": torch.zeros(5, dtype=torch.uint8)}
    save_file(with_model, tmp_path / "one.safetensors")
    assert opened(full, Files(text_encoder=tmp_path / "one.safetensors")).text_encoder.keys() == (
        opened(full).text_encoder.keys()
    )


def test_a_bundle_of_files_is_that_of_the_folder(full: Path, tmp_path: Path, cli: Run) -> None:
    files = [
        word
        for component, rename in (("transformer", original_transformer), ("text_encoder", original_text))
        for word in (
            f"--{component.replace('_', '-')}",
            repackaged(full, component, rename, tmp_path / f"{component}.safetensors"),
        )
    ]
    given = (full, "--resolution", "17x64x64")
    assert weights_of(cli, tmp_path / "folder", *given) == weights_of(cli, tmp_path / "files", *given, *files)


def test_refused(full: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "model.pth").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    command = ["build", full, "--target", "ort", "-o", tmp_path / "out", "--quiet"]
    assert "does not exist" in refused(*command, "--vae", tmp_path / "no.safetensors")
    assert "not a whole safetensors file" in refused(*command, "--vae", tmp_path / "empty.safetensors")
    assert "is no file of torch.save" in refused(*command, "--transformer", tmp_path / "model.pth")
    other = repackaged(full, "vae", str, tmp_path / "vae.safetensors")
    assert "is missing" in refused(*command, "--transformer", other)
    renamed = other.rename(tmp_path / "vae.pth")
    assert "it holds safetensors; rename it to vae.safetensors" in refused(*command, "--vae", renamed)
    assert not (tmp_path / "out").exists()
