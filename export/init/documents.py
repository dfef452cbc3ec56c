"""The JSON documents of a checkpoint's folder."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...runtime.chain.kinds import KINDS
from ...runtime.chain.pyramid import Resolution
from ...runtime.model.families.wan import WanConfig
from ...runtime.model.schedules import PAPER_SCHEDULES

__all__ = ["PPF_PATCHES", "model_index", "pyramid_document", "write_json"]

PPF_PATCHES = [[1, 2, 2], [2, 4, 4], [4, 8, 8], [8, 16, 16]]
"""Patch sizes of PPF's stages, finest first (supplement A3, continued by its pattern)."""


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one JSON document, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def model_index(
    parts: Collection[str],
    scheduler: str,
    *,
    pipeline: str = "WanPipeline",
    transformer: str = WanConfig.class_name,
    **fields: Any,
) -> dict[str, Any]:
    """`model_index.json` of a pipeline with the given parts, a scheduler of a class, and other fields."""
    classes = {
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", transformer],
        "transformer_2": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    listed = {name: value if name in parts else [None, None] for name, value in classes.items()}
    return {"_class_name": pipeline, "_diffusers_version": "0.39.0", **listed, **fields}


def pyramid_document(kind: str, stages: int, wavelet: str, resolution: Resolution, text_length: int) -> dict[str, Any]:
    """`pyramid.json` of a model of several stages; the paper's schedules where there are three."""
    facts = KINDS[kind]
    few = [2] * (stages - 1) + [1]
    steps = {"2-2-1": [2, 2, 1], "20-20-10": [20, 20, 10]} if stages == 3 else {"-".join(map(str, few)): few}
    schedules: dict[str, Any] = {
        name: {"steps": n, "shift": 5.0, "guidance_scale": PAPER_SCHEDULES.get(name, {}).get("guidance_scale", 1.0)}
        for name, n in steps.items()
    }
    return {
        "format": 1,
        "kind": kind,
        "stages": stages,
        **({"wavelet": wavelet, "axes": "THW", "first_frame": "separate"} if facts.halves else {}),
        "resolution": vars(resolution),
        "text_length": text_length,
        "schedules": schedules,
        "default_schedule": next(iter(schedules)),
        "negative_prompt": "",
        "patch_sizes": PPF_PATCHES[:stages] if facts.own_patch_layers else None,
    }
