"""Checkpoints as data: `pyramid.json`, the components' configurations, and the tensors' headers. No weight is read."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chain.pyramid import Pyramid, Resolution
from ..documents import Fields, read_json
from ..errors import UsageError
from .description import ModelDescription, describe_model, plain_document
from .families.wan import WanConfig, transformer_tensors
from .safetensors import TensorEntry, read_tensors

__all__ = ["Checkpoint", "read_checkpoint"]

Rename = Callable[[list[str]], Mapping[str, str]]
"""From names found to diffusers' names: original Wan names are converted by diffusers, which is not imported here."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose configurations and headers have been checked."""

    folder: Path
    model: ModelDescription
    config: WanConfig
    transformer: Mapping[str, TensorEntry]
    """By diffusers' name."""
    vae: Mapping[str, TensorEntry] = field(default_factory=dict)
    vae_config: Mapping[str, Any] | None = None
    text_encoder: Mapping[str, TensorEntry] = field(default_factory=dict)
    text_encoder_config: Mapping[str, Any] | None = None

    @property
    def components(self) -> dict[str, Mapping[str, TensorEntry]]:
        """Tensors of each component that is there."""
        named = {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.vae}
        return {name: tensors for name, tensors in named.items() if tensors}


def read_checkpoint(folder: Path, *, resolution: Resolution | None = None, rename: Rename | None = None) -> Checkpoint:
    """Read and check a checkpoint folder.

    Args:
        folder: a diffusers folder, with `pyramid.json` unless it is a plain Wan model.
        resolution: replaces the checkpoint's own.
        rename: converts names of tensors to diffusers'.

    Raises:
        UsageError: anything is missing, malformed, extra or of another shape; the message names it.
    """
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{folder} is not a checkpoint: expected a diffusers folder with model_index.json")
    read_json(folder / "model_index.json")
    source = folder / "transformer" / "config.json"
    config = WanConfig.from_json(read_json(source), str(source))
    if (folder / "transformer_2").is_dir():
        raise UsageError(f"{folder} has a second transformer (Wan2.2): only models with one transformer are supported")
    pyramid_file = folder / "pyramid.json"
    written = os.path.lexists(pyramid_file)
    document = read_json(pyramid_file) if written else _plain_document(folder)
    if resolution is not None:
        document = document | {"resolution": vars(resolution)}
    model = describe_model(document, config, str(pyramid_file) if written else str(folder))
    transformer = _transformer(folder, model.pyramid, config, rename)
    parts: dict[str, Any] = {}
    if (folder / "vae").is_dir():
        parts["vae_config"] = _vae_config(folder / "vae" / "config.json", config)
        parts["vae"] = read_tensors(folder / "vae", "diffusion_pytorch_model")
    if (folder / "text_encoder").is_dir():
        parts["text_encoder_config"] = _text_encoder_config(folder, config)
        parts["text_encoder"] = read_tensors(folder / "text_encoder", "model")
    return Checkpoint(folder, model, config, transformer, **parts)


def _plain_document(folder: Path) -> dict[str, Any]:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    document = read_json(scheduler) if scheduler.is_file() else {}
    # diffusers' UniPC calls the same number flow_shift.
    return plain_document(document.get("shift", document.get("flow_shift", 5.0)))


def _transformer(folder: Path, pyramid: Pyramid, config: WanConfig, rename: Rename | None) -> dict[str, TensorEntry]:
    part = folder / "transformer"
    found = read_tensors(part, "diffusion_pytorch_model")
    expected = transformer_tensors(config, pyramid.kind, pyramid.patch_sizes)
    if rename is not None:
        names = rename(list(found))
        if len(set(names.values())) != len(found):
            raise UsageError(
                f"{part}: two tensors stand for the same one: expected Wan's original names or diffusers', found both"
            )
        found = {names[name]: entry for name, entry in found.items()}
    for name, shape in expected.items():
        if name not in found:
            raise UsageError(
                f"{part}: tensor '{name}' is missing: expected shape {list(shape)} for a {pyramid.kind} model"
            )
        if found[name].shape != shape:
            raise UsageError(
                f"{part}: tensor '{name}' is misshaped: expected {list(shape)}, found {list(found[name].shape)}"
            )
        if found[name].dtype not in ("F32", "F16", "BF16"):
            raise UsageError(f"{part}: tensor '{name}': expected F32, F16 or BF16, found {found[name].dtype}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise UsageError(
            f"{part}: unexpected tensor '{extra[0]}' of shape {list(found[extra[0]].shape)} in a {pyramid.kind} model"
        )
    return {name: found[name] for name in expected}


def _vae_config(source: Path, config: WanConfig) -> dict[str, Any]:
    document = read_json(source)
    fields = Fields(document, str(source))
    fields.text("_class_name", "AutoencoderKLWan", choices=("AutoencoderKLWan",))
    channels = fields.integer("z_dim", 16)
    if channels != config.in_channels:
        raise fields.wrong("z_dim", f"{config.in_channels}, the transformer's input channels")
    if document.get("is_residual") or document.get("patch_size") is not None:
        raise UsageError(f"{source}: only Wan2.1's VAE is supported (4x8x8), found the residual one of Wan2.2")
    for name in ("latents_mean", "latents_std"):
        if document.get(name) is None:
            continue
        numbers = fields.numbers(name)
        if len(numbers) != channels or (name == "latents_std" and min(numbers) <= 0):
            raise fields.wrong(name, f"{channels} numbers" + " above 0" * (name == "latents_std"))
    return document


def _text_encoder_config(folder: Path, config: WanConfig) -> dict[str, Any]:
    source = folder / "text_encoder" / "config.json"
    document = read_json(source)
    fields = Fields(document, str(source))
    fields.text("model_type", choices=("umt5",))
    if fields.integer("d_model") != config.text_dim:
        raise fields.wrong("d_model", f"{config.text_dim}, the transformer's text_dim")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        raise UsageError(
            f"{folder / 'tokenizer' / 'tokenizer.json'} is missing: expected the fast tokenizer of the text encoder"
        )
    return document
