"""A checkpoint with the real names and shapes, and random weights.

One tensor is held at a time, in pieces of at most 64 MiB, so that the 14B preset fits a small machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from ...runtime.chain.kinds import KINDS, Kind
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import UsageError
from ...runtime.model.description import FORMAT, parse_model, plain_document
from ...runtime.model.families import Family, find_family
from ...runtime.model.families.wan import WanConfig
from ...runtime.model.scheduler import read_scheduler
from ...runtime.reporter import Reporter
from .documents import model_index, pyramid_document, write_json
from .folder import check_new_checkpoint, new_checkpoint
from .presets import PRESETS, Preset
from .tokenizer import make_tokenizer, write_tokenizer
from .values import RandomWriter

__all__ = ["RandomModel", "write_random"]

CORPUS = [
    "a red circle moving left",
    "a blue square moving right",
    "a cat and a dog bake a cake in a kitchen",
]


@dataclass(frozen=True)
class RandomModel:
    """What is to be made."""

    preset: str
    """A name of `presets.PRESETS`."""
    kind: str | None = None
    """In place of the preset's."""
    blocks: int | None = None
    """Transformer blocks, in place of the preset's."""
    width: int | None = None
    """Model width, a multiple of the head size; the feed-forward in proportion."""
    stages: int = 3
    wavelet: str = "haar"
    resolution: Resolution | None = None
    """What it is sampled at, in place of the preset's."""
    text_encoder: bool = True
    vae: bool = True
    dtype: str | None = None
    """Number type of the transformer, in place of the preset's."""
    shard_bytes: int = 10_000_000_000
    seed: int = 0

    @property
    def facts(self) -> Preset:
        """What the preset says."""
        return PRESETS[self.preset]


def write_random(out: Path, model: RandomModel, *, force: bool = False, reporter: Reporter | None = None) -> None:
    """Write a random checkpoint.

    Args:
        out: the checkpoint's folder.
        model: what to write.
        force: replace a checkpoint that is there.
        reporter: told about progress.

    Raises:
        UsageError: the folder is there, or there is no such model.
    """
    facts, kind = model.facts, KINDS[model.kind or model.facts.kind]
    if kind.clocked != KINDS[facts.kind].clocked or (kind.clocked and model.stages != 3):
        raise UsageError(f"kind and stages of --random {model.preset} are its scheduler's: leave out --kind, --stages")
    if kind.most_stages == 1 and model.stages not in (1, 3):  # 3 is what nobody asked for
        raise UsageError(f"a {kind.name} model has one stage, found {model.stages}")
    check_new_checkpoint(out, force=force)
    config, resolution = _transformer_config(model), model.resolution or facts.resolution
    family = find_family(config.to_json(), facts.vae, "checkpoint")
    with new_checkpoint(out) as folder:
        writer = RandomWriter(model.seed, model.shard_bytes, reporter or Reporter())
        _write_index(folder, model, family)
        document = _document(folder, model, family, kind, resolution)
        sizeless = {name: value for name, value in document.items() if name != "resolution"}
        described = parse_model(sizeless | {"wavelet": model.wavelet}, family, config, "checkpoint")
        described.stages(resolution)
        if not (kind.clocked or kind.most_stages == 1) or model.resolution is not None:
            write_json(folder / "pyramid.json", document)
        tensors = family.transformer_tensors(config, kind, described.pyramid.patch_sizes)
        for index, name in enumerate(_transformers(facts)):
            # The values of a tensor depend on its name and the seed alone.
            _write_transformer(folder / name, model, config, tensors, replace(writer, seed=writer.seed + index))
        if model.vae:
            _write_vae(folder / "vae", model, writer)
        if model.text_encoder:
            _write_text(folder, model, writer)


def _document(folder: Path, model: RandomModel, family: Family, kind: Kind, resolution: Resolution) -> dict[str, Any]:
    """What `pyramid.json` says, or would say: of a plain model and one with clocks its scheduler does."""
    length = model.facts.text_length
    if kind.clocked:
        own = family.described(folder) or {}
        return {"format": FORMAT, **own, "resolution": vars(resolution), "text_length": length}
    if kind.most_stages == 1:
        solver, shift = read_scheduler(folder)
        return plain_document(shift, solver, resolution, model.facts.boundary) | {"text_length": length}
    return pyramid_document(kind.name, model.stages, model.wavelet, resolution, length)


def _transformers(facts: Preset) -> tuple[str, ...]:
    return ("transformer",) if facts.boundary is None else ("transformer", "transformer_2")


def _transformer_config(model: RandomModel) -> WanConfig:
    config = model.facts.config(**model.facts.transformer)
    if model.width is not None:
        if model.width % config.attention_head_dim:
            raise UsageError(f"--width is a multiple of the head size {config.attention_head_dim}, found {model.width}")
        ffn_dim = config.ffn_dim * model.width // config.width
        config = replace(config, ffn_dim=ffn_dim, num_attention_heads=model.width // config.attention_head_dim)
    return replace(config, num_layers=model.blocks or config.num_layers)


def _write_index(folder: Path, model: RandomModel, family: Family) -> None:
    facts = model.facts
    components = [*_transformers(facts), "scheduler"]
    components += ["vae"] if model.vae else []
    components += ["text_encoder", "tokenizer"] if model.text_encoder else []
    fields: dict[str, Any] = {} if facts.boundary is None else {"boundary_ratio": facts.boundary}
    classes: dict[str, Any] = {"pipeline": family.pipeline_class, "transformer": family.transformer_class}
    index = model_index(components, facts.scheduler["_class_name"], **classes, **fields, **facts.index)
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", facts.scheduler)


def _write_transformer(
    folder: Path,
    model: RandomModel,
    config: WanConfig,
    tensors: Mapping[str, tuple[int, ...]],
    writer: RandomWriter,
) -> None:
    dtype = model.dtype or model.facts.dtype
    writer.write(folder, "diffusion_pytorch_model", tensors, dtype=dtype, blocks=config.num_layers)
    head = {"_diffusers_version": "0.39.0", "qk_norm": "rms_norm_across_heads"}
    write_json(folder / "config.json", config.to_json() | head)


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors, tied ones once."""
    tied = getattr(module, "_tied_weights_keys", None) or ()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in tied}


def _write_vae(folder: Path, model: RandomModel, writer: RandomWriter) -> None:
    """Write the preset's VAE."""
    with init_empty_weights():
        autoencoder = AutoencoderKLWan(**model.facts.vae)
    writer.write(folder, "diffusion_pytorch_model", _shapes(autoencoder), dtype="float32", blocks=8)
    autoencoder.save_config(folder)


def _write_text(folder: Path, model: RandomModel, writer: RandomWriter) -> None:
    """Write the preset's encoder, and a tokenizer."""
    facts = model.facts
    config = UMT5Config(**facts.text, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with init_empty_weights():
        encoder = UMT5EncoderModel(config)
    writer.write(folder / "text_encoder", "model", _shapes(encoder), dtype=facts.text_dtype, blocks=config.num_layers)
    write_json(folder / "text_encoder" / "config.json", config.to_dict() | {"architectures": ["UMT5EncoderModel"]})
    write_tokenizer(folder / "tokenizer", make_tokenizer(CORPUS, min(config.vocab_size, 2000)))
