"""The demonstration checkpoint: what it says of itself, and its folder."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from moving_shapes import FRAMES, SIZE
from pyrexport.export.init.documents import model_index, write_json
from pyrexport.export.init.presets import EULER
from pyrexport.export.init.tokenizer import write_tokenizer
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.files import file_digest
from pyrexport.runtime.model.description import Model, parse_model
from pyrexport.runtime.model.families.wan import WAN, WanConfig
from pyrexport.runtime.model.siblings import folder_digest
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import UMT5Config

CONFIG = WanConfig(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4, text_dim=128, freq_dim=256)
PPF_CONFIG = replace(CONFIG, ffn_dim=768)
PPF_PATCHES = [[1, 2, 2], [2, 4, 4], [2, 8, 8]]
"""The paper's, but for half the time in the coarsest: layers of 4x8x8 would be a third of so small a model."""
UMT5 = {
    "d_model": 128,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 256,
    "dropout_rate": 0.0,
}
TEXT_LENGTH = 32
RESOLUTION = Resolution(FRAMES, SIZE, SIZE)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Components:
    """What was trained."""

    transformer: Tensors
    text_encoder: Tensors
    umt5: UMT5Config
    tokenizer: Tokenizer
    vae: AutoencoderKLWan
    mean: torch.Tensor
    """Of the latents, per channel."""
    std: torch.Tensor


SCHEDULES = {"2-2-1": 1.0, "10-10-10": 1.0, "8-6-6": 3.0}
"""Steps of each stage, and the guidance scale; the last one is the default."""
DISTILLED = {"2-2-1": 1.0}


def describe(kind: str, schedules: Mapping[str, float] = SCHEDULES) -> Model:
    """The model that is trained."""
    document = {
        "format": 1,
        "kind": kind,
        "stages": 3,
        "text_length": TEXT_LENGTH,
        "schedules": {
            name: {"steps": list(map(int, name.split("-"))), "shift": 5.0, "guidance_scale": guidance}
            for name, guidance in schedules.items()
        },
        "default_schedule": list(schedules)[-1],
        "patch_sizes": PPF_PATCHES if kind == "ppf" else None,
    }
    config = PPF_CONFIG if kind == "ppf" else CONFIG
    return parse_model(document, WAN, config, "the demonstration's pyramid.json")


def write_checkpoint(out: Path, model: Model, components: Components, parts: Path | None = None) -> None:
    """The checkpoint folder, weights in float16, written beside and renamed.

    Args:
        out: the folder.
        model: what it says of itself.
        components: what is in it.
        parts: a checkpoint that text encoder and VAE come from: beside the folder, it is referred to.
    """
    shared = parts is not None and parts.resolve().parent == out.absolute().parent.resolve()
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    partial.chmod(0o755)
    write_weights(partial / "transformer" / "diffusion_pytorch_model.safetensors", components.transformer)
    if not shared:
        _write_parts(partial, components)
    head = {"_diffusers_version": "0.39.0", "qk_norm": "rms_norm_across_heads"}
    write_json(partial / "transformer" / "config.json", model.transformer.to_json() | head)
    write_json(partial / "scheduler" / "scheduler_config.json", EULER)
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    index = model_index(names, EULER["_class_name"])
    write_json(partial / "model_index.json", index)
    siblings = {"components": _siblings(parts)} if parts is not None and shared else {}
    write_json(partial / "pyramid.json", model.to_json() | {"resolution": vars(RESOLUTION)} | siblings)
    partial.replace(out)


def _siblings(parts: Path) -> dict[str, dict[str, str]]:
    return {
        name: {"path": f"../{parts.resolve().name}/{name}", "sha256": folder_digest(parts / name, file_digest)}
        for name in ("text_encoder", "tokenizer", "vae", "tiny_decoder")
        if (parts / name).is_dir()
    }


def _write_parts(partial: Path, components: Components) -> None:
    """Text encoder, tokenizer and VAE."""
    write_weights(partial / "text_encoder" / "model.safetensors", components.text_encoder)
    write_weights(partial / "vae" / "diffusion_pytorch_model.safetensors", components.vae.state_dict())
    components.vae.save_config(partial / "vae")
    config = json.loads((partial / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)  # where the VAE was read from
    statistics = {"latents_mean": components.mean.tolist(), "latents_std": components.std.tolist()}
    write_json(partial / "vae" / "config.json", config | statistics)
    architecture = {"architectures": ["UMT5EncoderModel"]}
    write_json(partial / "text_encoder" / "config.json", components.umt5.to_dict() | architecture)
    components.tokenizer.no_padding()
    components.tokenizer.no_truncation()
    write_tokenizer(partial / "tokenizer", components.tokenizer)


def write_weights(file: Path, tensors: Tensors) -> None:
    """Tensors in float16, in a file that everybody may read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().half().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(half, file, metadata={"format": "pt"})
    file.chmod(0o644)
