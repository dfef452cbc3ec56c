"""The manifest of a bundle: what it holds, and what it was made of."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ...runtime.bundle.manifest import FORMAT, signed
from ...runtime.bundle.opening import file_digest
from ...runtime.model.checkpoint import Checkpoint
from ...targets.forms import Placement
from .parts import Options, latent_statistics, text_lengths, tile_plan, timestep_frequencies

__all__ = ["describe_bundle"]

PACKAGES = ("pyrexport", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def describe_bundle(
    checkpoint: Checkpoint,
    options: Options,
    target: str,
    engine: Mapping[str, str],
    *,
    compute: str,
    graphs: Mapping[str, Any],
    table: Placement | None,
    weight_bytes: int,
    files: Mapping[str, Any],
) -> dict[str, Any]:
    """A signed manifest.

    Args:
        checkpoint: that the bundle was made of.
        options: that it was made with.
        target: its name.
        engine: name and version.
        compute: precision of the arithmetic.
        graphs: inputs, outputs, file and memory of each.
        table: where the text encoder's embeddings lie, if there is one.
        weight_bytes: of all weights, without padding.
        files: SHA-256 and size of each.
    """
    mean, std = latent_statistics(checkpoint)
    return signed(
        {
            "format": FORMAT,
            "target": target,
            "engine": dict(engine),
            "model": checkpoint.model.to_json(),
            "transformer": {
                name: list(v) if isinstance(v, tuple) else v for name, v in vars(checkpoint.config).items()
            },
            "precision": {"storage": options.precision, "text": options.text_precision, "compute": compute},
            "timestep_frequencies": timestep_frequencies(checkpoint.config.freq_dim),
            "latents": {"mean": mean, "std": std},
            "text": None if table is None else _describe_text(checkpoint, table),
            "vae": _describe_vae(checkpoint, options),
            "graphs": dict(graphs),
            "weights": {"bytes": weight_bytes},
            "files": dict(files),
            "provenance": _provenance(checkpoint, options),
            "parity": None,
            "graph_parity": None,
        }
    )


def _describe_text(checkpoint: Checkpoint, place: Placement) -> dict[str, Any]:
    table = {"offset": place.offset, "rows": place.shape[0], "width": place.shape[1], "dtype": place.dtype}
    return {"lengths": text_lengths(checkpoint), "table": table}


def _describe_vae(checkpoint: Checkpoint, options: Options) -> dict[str, Any] | None:
    if not checkpoint.vae:
        return None
    plan = tile_plan(checkpoint, options)
    return {
        "tile": list(plan.tile), "tiles": plan.count, "overhead": round(plan.overhead, 4), "caches": options.vae_caches,
    }  # fmt: skip


def _provenance(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    files: dict[str, str] = {}
    for component in checkpoint.components:
        for file in sorted({entry.file for entry in checkpoint.components[component].values()}):
            files[f"{component}/{file.name}"] = file_digest(file)
    lines = "\n".join(f"{name} {sha}" for name, sha in files.items())
    return {
        "checkpoint": {"sha256": hashlib.sha256(lines.encode()).hexdigest(), "files": files},
        "packages": {name: version(name) for name in PACKAGES},
        "options": vars(options),
    }
