"""The manifest of a finished bundle: what it holds, and what it was made of."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...runtime.bundle.entries import FileEntry, GraphEntry, TableEntry, TextEntry
from ...runtime.bundle.graphs import GraphKey
from ...runtime.bundle.manifest import TOKENIZER_FILE, WEIGHTS_FILE, Manifest
from ...runtime.bundle.sizes import Size
from ...runtime.files import file_digest
from ...runtime.model.identity import checkpoint_digest, checkpoint_files
from ...runtime.reporter import Reporter
from ..families import modules_of
from .blueprint import Blueprint
from .preview import find_preview

__all__ = ["make_manifest", "timestep_frequencies"]

PACKAGES = ("pyrexport", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def make_manifest(
    folder: Path,
    blueprint: Blueprint,
    graphs: Mapping[GraphKey, GraphEntry],
    programs: Sequence[str],
    reporter: Reporter,
) -> Manifest:
    """Hash the files, those of programs among them, and say what they are."""
    checkpoint, target, options = blueprint.checkpoint, blueprint.target, blueprint.options
    mean, std = modules_of(checkpoint.model.family).latent_statistics(checkpoint)
    engine, engine_version = target.engine_of(options.target)
    return Manifest(
        target=target.name,
        target_options=options.target,
        engine=engine,
        engine_version=engine_version,
        model=options.model(checkpoint),
        sizes=_sizes(blueprint, graphs),
        frame_rate=checkpoint.model.family.frame_rate,
        precision=options.precision,
        quantised={component: scheme.name for component, scheme in options.quantised.items()},
        ranges={} if options.calibration is None else options.calibration.intervals,
        compute=target.computes or (options.precision["transformer"] if target.computes_as_stored else "fp32"),
        timestep_frequencies=timestep_frequencies(checkpoint.model.transformer.freq_dim),
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        preview=find_preview(checkpoint, reporter),
        text=_text(blueprint),
        files=_files(folder, blueprint, programs, reporter),
        weight_bytes=blueprint.weight_bytes,
        provenance=_provenance(blueprint),
        parity={},
        graph_parity={},
    )


def _sizes(blueprint: Blueprint, graphs: Mapping[GraphKey, GraphEntry]) -> tuple[Size, ...]:
    return tuple(
        Size(
            resolution,
            {decoder.component: decoder for decoder in blueprint.decoders[resolution]},
            {key: graphs[spec.key] for key, spec in specs.items()},
        )
        for resolution, specs in blueprint.specs.items()
    )


def timestep_frequencies(width: int) -> tuple[float, ...]:
    """Frequencies of the timestep features, by diffusers' formula in PyTorch's float32."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(0, half, dtype=torch.float32) / half
    return tuple(float(value) for value in torch.exp(exponent))


def _text(blueprint: Blueprint) -> TextEntry | None:
    if blueprint.table is None:
        return None
    place = blueprint.files[WEIGHTS_FILE].of[blueprint.table]
    rows, width = place.shape
    return TextEntry(blueprint.lengths, TableEntry(place.offset, rows, width, place.dtype), version("ftfy"))


def _files(folder: Path, blueprint: Blueprint, programs: Sequence[str], reporter: Reporter) -> dict[str, FileEntry]:
    names = list(programs)
    names += [WEIGHTS_FILE] if WEIGHTS_FILE in blueprint.files else []
    names += [TOKENIZER_FILE] if blueprint.checkpoint.text_encoder else []
    files = {}
    for name in names:
        nbytes = (folder / name).stat().st_size
        reporter.begin(f"hash of {name}", nbytes)
        files[name] = FileEntry(file_digest(folder / name, reporter.advance), nbytes)
    return files


def _provenance(blueprint: Blueprint) -> dict[str, Any]:
    files, recipe = checkpoint_files(blueprint.checkpoint), blueprint.options.calibration
    return {
        "recipe": None if recipe is None else {"sha256": recipe.sha256, "prompts": recipe.prompts},
        "checkpoint": {"sha256": checkpoint_digest(files), "files": files},
        "packages": {name: version(name) for name in PACKAGES},
    }
