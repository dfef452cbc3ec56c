"""What users hold, made at a tiny size: checkpoints, and the options that read the rest beside them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from pyrexport.cli import main
from safetensors.torch import load_file, save_file
from support.originals import original_text, original_transformer
from support.scales import scaled

__all__ = ["HOLDINGS", "OPTIONS", "Held", "prove"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
LEAN = ("--no-text-encoder", "--no-vae")
SIZE = ("--resolution", "17x64x64")
OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ort": ((), ()),
    "executorch": ((), ()),
    "trt": (("--compute-capability", "8.9"), ("--graph",)),
}
"""By target: what `build` and `parity` are given."""


@dataclass(frozen=True)
class Held:
    """A checkpoint, and options of `build` and `parity` alike."""

    checkpoint: Path
    options: tuple[str, ...] = ()


def run(*words: object) -> Result:
    """A command line that succeeds, in this process."""
    result = CliRunner().invoke(main, [*map(str, words), "--quiet"])
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result


def random(out: Path, *words: str) -> Path:
    """A tiny random checkpoint."""
    run("init", "--random", "tiny", *SIZE, *words, "-o", out)
    return out


def repackaged(checkpoint: Path, component: str, file: Path, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """A component's tensors under other names, written as one file."""
    (own,) = (checkpoint / component).glob("*.safetensors")
    tensors = {rename(name): tensor for name, tensor in load_file(own).items()}
    save_file(tensors, file)
    return tensors


def comfy(name: str) -> str:
    """ComfyUI's name of a transformer's tensor."""
    return f"model.diffusion_model.{original_transformer(name)}"


def diffusers(folder: Path) -> Held:
    """A pyramidal model as a diffusers folder, with all parts."""
    return Held(random(folder / "checkpoint"))


def original(folder: Path) -> Held:
    """A folder as Wan's repositories have it, its weights in pickles, made into a checkpoint."""
    tensors = repackaged(
        random(folder / "made", "--kind", "plain", *LEAN), "transformer", folder / WEIGHTS, original_transformer
    )
    source = folder / "source"
    source.mkdir()
    torch.save(tensors, source / "diffusion_pytorch_model.pth")
    run("init", source, "--heads", 4, *SIZE, "-o", folder / "checkpoint")
    return Held(folder / "checkpoint")


def single(folder: Path) -> Held:
    """Single files in place of the transformer and the text encoder."""
    checkpoint = random(folder / "checkpoint", "--no-vae", "--kind", "plain")
    repackaged(checkpoint, "transformer", folder / "transformer.safetensors", comfy)
    repackaged(checkpoint, "text_encoder", folder / "text.safetensors", original_text)
    return Held(
        checkpoint,
        ("--transformer", f"{folder}/transformer.safetensors", "--text-encoder", f"{folder}/text.safetensors"),
    )


def floats8(folder: Path) -> Held:
    """A single file in 8-bit floats, with a scale for each matrix of a block."""
    checkpoint = random(folder / "checkpoint", "--kind", "plain", *LEAN)
    tensors = repackaged(checkpoint, "transformer", folder / "transformer.safetensors", comfy)
    save_file(scaled(tensors, ".scale_weight", by_row=False), folder / "transformer.safetensors")
    return Held(checkpoint, ("--transformer", f"{folder}/transformer.safetensors"))


def lora(folder: Path) -> Held:
    """A LoRA of some layers, merged into a pyramidal model."""
    checkpoint = random(folder / "checkpoint", *LEAN)
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (out, into) in {"self_attn.q": (64, 64), "ffn.0": (128, 64)}.items():
        tensors[f"diffusion_model.blocks.0.{layer}.lora_up.weight"] = torch.randn(out, 4, generator=draw) / 8
        tensors[f"diffusion_model.blocks.0.{layer}.lora_down.weight"] = torch.randn(4, into, generator=draw) / 8
    save_file(tensors, folder / "lora.safetensors")
    return Held(checkpoint, ("--lora", f"{folder}/lora.safetensors:0.5"))


def parts(folder: Path, kind: str, option: str, added: tuple[str, ...]) -> Held:
    """A plain transformer, and what a kind adds to it in a file of its own."""
    made = random(folder / "made", "--kind", kind, *LEAN)
    tensors = repackaged(made, "transformer", folder / "all.safetensors", str)
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(added)}
    if kind == "ppf":  # the transformer's own layers are those of stage 0
        for name in [name for name in own if name.split(".")[1] == "0"]:
            tensors[name.replace(".0.", ".")] = own.pop(name)
    save_file({original_transformer(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    save_file(own, folder / "added.safetensors")
    words = (folder / "model.safetensors", option, folder / "added.safetensors", "--heads", 4)
    run("init", *words, *SIZE, "-o", folder / "checkpoint")
    return Held(folder / "checkpoint")


HOLDINGS: Mapping[str, Callable[[Path], Held]] = {
    "a diffusers folder": diffusers,
    "Wan's folder, pickles": original,
    "single files": single,
    "8-bit floats": floats8,
    "a LoRA": lora,
    "a first frame's vector": lambda folder: parts(
        folder, "pyramidal", "--first-frame-embedding", ("first_frame_embedding",)
    ),
    "PPF's patch layers": lambda folder: parts(folder, "ppf", "--patch-layers", ("patch_embedding", "proj_out")),
    "Wan2.2-TI2V": lambda folder: Held(random(folder / "checkpoint", "--random", "tiny-ti2v", "--no-text-encoder")),
    "Wan2.2-A14B": lambda folder: Held(random(folder / "checkpoint", "--random", "tiny-a14b", *LEAN)),
}
"""By what it is: made in a folder."""


def prove(held: Held, target: str, out: Path) -> dict[str, float]:
    """Build for a target and hold it against its reference: relative L2 of each level that has one.

    Raises:
        AssertionError: it cannot be built, or a level is out of tolerance.
    """
    built, proved = OPTIONS[target]
    run("build", held.checkpoint, "--target", target, "-o", out, *SIZE, *built, *held.options)
    how = ("--prompt", "a cat", "--schedule", steps_of(held.checkpoint), "--json", *held.options)
    levels = json.loads(run("parity", out, "--reference", held.checkpoint, *proved, *how).stdout)["levels"]
    return {name: level["relative_l2"] for name, level in levels.items() if "relative_l2" in level}


def steps_of(checkpoint: Path) -> str:
    """A few steps of a checkpoint's stages."""
    stages = json.loads((checkpoint / "pyramid.json").read_text())["stages"]
    return "4" if stages == 1 else "-".join(["1"] * stages)
