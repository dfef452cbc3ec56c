"""Checkpoints as data: `pyramid.json`, the components' configurations, and the tensors' headers. No weight is read."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..chain.pyramid import Resolution
from ..documents import Fields, read_json
from ..dtypes import DTYPES, WEIGHT_DTYPES
from ..errors import UsageError
from .description import FORMAT, Model, parse_model, parse_resolution, plain_document
from .families import DecoderConfig, Family, TinyDecoderConfig, TransformerConfig, find_family
from .safetensors import TensorEntry, read_header, read_tensors
from .scales import fold_scales
from .scheduler import read_boundary, read_scheduler
from .siblings import component_folders
from .text_encoder import text_encoder_config, with_table
from .variants import STEMS, require_variant

__all__ = ["Checkpoint", "Files", "Lora", "assumed_document", "check_tensors", "read_checkpoint", "read_family"]

Rename = Callable[[str, list[str]], Mapping[str, str]]
"""Maps names that were found in a component to diffusers' and transformers' names, those that stand for nothing left
out: diffusers converts original Wan names, and is not imported here."""

Header = Callable[[Path], dict[str, TensorEntry]]

Tensors = Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Files:
    """Which files of a checkpoint's weights are read."""

    variant: str | None = None
    """Of the weights' files, such as "fp16"; None: the plain ones, or the only ones there."""
    transformer: Path | None = None
    """A file in place of those in the component's folder."""
    transformer_2: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tiny_decoder: Path | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA that is part of a transformer's weights, and how much of it."""

    file: Path
    scale: float
    component: str = "transformer"
    """Whose weights it changes: of a model of two networks, of one of them."""

    def __str__(self) -> str:
        part = "" if self.component == "transformer" else f"{self.component}="
        return f"{part}{self.file.name}:{self.scale}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose configurations and headers have been checked."""

    folder: Path
    folders: Mapping[str, Path]
    """Of each component, whether it is there or not."""
    model: Model
    resolution: Resolution
    """What it is sampled at unless another is asked for."""
    transformer: Tensors
    """The transformer's tensors, by diffusers' name."""
    vae: Tensors = field(default_factory=dict)
    vae_config: Mapping[str, Any] | None = None
    text_encoder: Tensors = field(default_factory=dict)
    text_encoder_config: Mapping[str, Any] | None = None
    loras: tuple[Lora, ...] = ()
    transformer_2: Tensors = field(default_factory=dict)
    """Of a model of two networks: those of the second."""
    tiny_decoder: Tensors = field(default_factory=dict)

    @property
    def components(self) -> dict[str, Tensors]:
        """Tensors of each component that is there."""
        named = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        named |= {"text_encoder": self.text_encoder, "vae": self.vae, "tiny_decoder": self.tiny_decoder}
        return {name: tensors for name, tensors in named.items() if tensors}

    @property
    def tokenizer_file(self) -> Path:
        """The fast tokenizer of the text encoder."""
        return self.folders["tokenizer"] / "tokenizer.json"


def read_checkpoint(
    folder: Path,
    *,
    resolution: Resolution | None = None,
    rename: Rename | None = None,
    files: Files = Files(),
    header: Header = read_header,
) -> Checkpoint:
    """Read and check a checkpoint folder.

    Args:
        folder: a diffusers folder, with `pyramid.json` unless it is a plain Wan model.
        resolution: replaces the checkpoint's own.
        rename: converts names of tensors to diffusers'.
        files: which files hold the weights.
        header: reads where the tensors of a single one of them lie: more than safetensors is the export's to read.

    Raises:
        UsageError: anything is missing, malformed, extra or of another shape; the message names it.
    """
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{folder} is not a checkpoint: expected a diffusers folder with model_index.json")
    file = folder / "pyramid.json"
    own = read_json(file) if os.path.lexists(file) else None
    folders = component_folders(folder, Fields(own or {}, str(file)))
    family, config = read_family(folders)
    written = str(file if own is not None else folder)
    document = assumed_document(folder, family) if own is None else own
    fields = Fields(_with_boundary(folder, document), written)
    resolution = parse_resolution(fields) if resolution is None else resolution
    sizeless = {name: value for name, value in fields.document.items() if name not in ("resolution", "components")}
    model = parse_model(sizeless, family, config, written)
    try:
        model.stages(resolution)
    except UsageError as error:
        raise UsageError(f"{written}: {error}") from None
    if files.variant is not None:
        names = (f"{name}/{path.name}" for name, own in folders.items() for path in own.glob("*"))
        require_variant(names, files.variant, folder)
    read = partial(_tensors, folders, files, rename, header)
    components, decoders = _components(folders, model, files, read)
    components |= _transformers(folders, model, files, read)
    return Checkpoint(folder, folders, replace(model, decoders=decoders), resolution, **components)


def _components(
    folders: Mapping[str, Path], model: Model, files: Files, read: Callable[[str], dict[str, TensorEntry]]
) -> tuple[dict[str, Any], dict[str, DecoderConfig]]:
    """Tensors and configurations of the components that may be left out, and those of decoders by component."""
    components, decoders = dict[str, Any](), dict[str, DecoderConfig]()
    if folders["vae"].is_dir() or files.vae is not None:
        source = folders["vae"] / "config.json"
        document = components["vae_config"] = read_json(source)
        decoders["vae"] = model.family.read_decoder(document, model.transformer, str(source))
        components["vae"] = read("vae")
    if folders["tiny_decoder"].is_dir() or files.tiny_decoder is not None:
        source = files.tiny_decoder or folders["tiny_decoder"]
        components["tiny_decoder"], decoders["tiny_decoder"] = _tiny_decoder(read("tiny_decoder"), source, model)
    if folders["text_encoder"].is_dir() or files.text_encoder is not None:
        components["text_encoder_config"] = text_encoder_config(folders, model)
        components["text_encoder"] = with_table(read("text_encoder"))
    return components, decoders


def _tiny_decoder(found: Tensors, source: Path, model: Model) -> tuple[Tensors, TinyDecoderConfig]:
    """The tensors of a tiny decoder, without those of the encoder that its file may hold, and what they say of it."""
    tensors = {name: entry for name, entry in found.items() if not name.startswith("encoder.")}
    shapes = {name: entry.shape for name, entry in tensors.items()}
    config = TinyDecoderConfig.from_shapes(shapes, model.pyramid.geometry, str(source))
    expected, growths = config.tensors(), [f"{level.growth}.weight" for level in config.levels]
    tensors |= {name: tensors[name].last_rows(expected[name][0]) for name in growths if name in tensors}
    check_tensors(source, tensors, expected, "a tiny decoder")
    return {name: tensors[name] for name in expected}, config


def _tensors(
    folders: Mapping[str, Path], files: Files, rename: Rename | None, header: Header, component: str
) -> dict[str, TensorEntry]:
    """A component's tensors, by diffusers' names."""
    single, folder = getattr(files, component), folders[component]
    if single is not None and not single.is_file():
        what = "is no file" if single.exists() else "does not exist"
        raise UsageError(f"{single} {what}: expected a file that holds the {component}")
    found = read_tensors(folder, STEMS[component], files.variant) if single is None else header(single)
    folded = fold_scales(found)
    if rename is None:
        return folded
    names = rename(component, list(folded))
    if len(set(names.values())) != len(names):
        raise UsageError(
            f"{single or folder}: two tensors stand for the same one: expected Wan's original names or diffusers', "
            "found both"
        )
    return {new: folded[name] for name, new in names.items()}


def read_family(folders: Mapping[str, Path]) -> tuple[Family, TransformerConfig]:
    """The family of a transformer, by its configuration and the VAE's, and the first of these.

    Args:
        folders: of the components.

    Raises:
        UsageError: a configuration is malformed, or of no family.
    """
    source = folders["transformer"] / "config.json"
    document = read_json(source)
    decoder = read_json(folders["vae"] / "config.json") if folders["vae"].is_dir() else None
    family = find_family(document, decoder, str(source))
    return family, family.read_transformer(document, str(source))


def assumed_document(folder: Path, family: Family) -> dict[str, Any]:
    """What the `pyramid.json` of a folder without one would say.

    Raises:
        UsageError: its scheduler is not one of the family that is supported.
    """
    described = family.described(folder)
    if described is not None:
        return {"format": FORMAT, "resolution": vars(family.plain_resolution), **described}
    solver, shift = read_scheduler(folder)
    return plain_document(shift, solver, family.plain_resolution, read_boundary(folder))


def _with_boundary(folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    boundary = read_boundary(folder)
    return own if boundary is None else {"boundary_ratio": boundary} | own


def _transformers(
    folders: Mapping[str, Path], model: Model, files: Files, read: Callable[[str], dict[str, TensorEntry]]
) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each of a model's networks, which are of one configuration."""
    second = folders["transformer_2"]
    there = second.is_dir() or files.transformer_2 is not None
    if there != (model.experts > 1):
        expected = (
            f"a boundary_ratio in model_index.json, or no folder {second.name}"
            if there
            else f"the folder {second.name}, or no boundary_ratio"
        )
        raise UsageError(f"{second.parent}: a model of two transformers has both and a boundary: expected {expected}")
    names = ("transformer", "transformer_2")[: model.experts]
    for name in names[1:]:
        source = folders[name] / "config.json"
        if source.is_file() and model.family.read_transformer(read_json(source), str(source)) != model.transformer:
            raise UsageError(f"{source}: expected the configuration of {folders['transformer']}, found another")
    return {name: _transformer(read(name), folders[name], model) for name in names}


def _transformer(found: Tensors, folder: Path, model: Model) -> dict[str, TensorEntry]:
    pyramid = model.pyramid
    expected = model.family.transformer_tensors(model.transformer, pyramid.kind, pyramid.patch_sizes)
    check_tensors(folder, found, expected, f"a {pyramid.kind.name} model")
    return {name: found[name] for name in expected}


def check_tensors(
    folder: Path,
    found: Tensors,
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Compare the tensors of a component with those that it should have.

    Args:
        folder: the component's folder, for errors.
        found: the tensors that are there, by name.
        expected: the shapes that they should have, by name.
        what: the module that they should be the tensors of, for errors.
        optional: names that may be missing.

    Raises:
        UsageError: one is missing, misshaped, of another dtype than weights have, or extra; the message names it.
    """
    for name, shape in expected.items():
        if name not in found:
            if name in optional:
                continue
            raise UsageError(f"{folder}: tensor '{name}' is missing: expected shape {list(shape)} for {what}")
        if found[name].shape != shape:
            raise UsageError(
                f"{folder}: tensor '{name}' is misshaped: expected {list(shape)}, found {list(found[name].shape)}"
            )
        if found[name].values not in WEIGHT_DTYPES:
            code = DTYPES[found[name].dtype].safetensors
            raise UsageError(f"{folder}: tensor '{name}': expected F32, F16 or BF16, found {code}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise UsageError(f"{folder}: unexpected tensor '{extra[0]}' of shape {list(found[extra[0]].shape)} in {what}")
