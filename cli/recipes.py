"""What a recipe says, as a document and as tables for people."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..runtime.ranges import Ranges, output_of
from ..runtime.recipe import Calibration
from .common import print_table

__all__ = ["recipe_document", "show_recipe"]

TOP = 8
"""Inputs of layers that the table shows of each stage."""


def recipe_document(recipe: Calibration, path: Path) -> dict[str, Any]:
    """The JSON document of a recipe."""
    return {
        "recipe": str(path),
        "bytes": path.stat().st_size,
        "hash": recipe.hash,
        **recipe.run.to_json(),
        "warnings": list(recipe.warnings),
        "methods": dict(recipe.methods),
        "target_psnr": recipe.target_psnr,
        "trials": [asdict(trial) for trial in recipe.trials],
        "layers": {name: _layer(recipe, name, ranges) for name, ranges in recipe.layers.items()},
    }


def _layer(recipe: Calibration, name: str, ranges: Ranges) -> dict[str, Any]:
    maximum, groups = ranges.maximum, ranges.channels.max(axis=2)
    low, high = ranges.lowest.min(axis=(1, 2)), ranges.highest.max(axis=(1, 2))
    names = recipe.run.groups if groups.shape[1] == len(recipe.run.groups) else ("all",)
    stages = [
        {
            "stage": stage,
            "lowest": float(low[stage]),
            "highest": float(high[stage]),
            "magnitude": float(ranges.magnitude[stage]),
            "ratio": float(maximum[stage] / ranges.magnitude[stage]),
            "groups": dict(zip(names, map(float, groups[stage]), strict=True)),
            "passes": dict(zip(recipe.run.passes, map(float, ranges.passes[stage]), strict=True)),
        }
        for stage in range(recipe.stages)
    ]
    choice = recipe.choices[name].to_json()
    return {"width": ranges.width, "stages": stages, "steps": list(map(float, ranges.steps)), "choice": choice}


def show_recipe(document: Mapping[str, Any]) -> None:
    """Print the document of a recipe: what was run, and the layers whose extremes stand out most."""
    layers, schedule = document["layers"], document["schedule"]
    levels = " / ".join(", ".join(f"{level:.4g}" for level in group) for group in schedule["levels"])
    count = sum(layer == layer.removesuffix(output_of("")) for layer in layers)
    click.echo(
        f"{document['recipe']}: {count} layers of a {document['kind']} checkpoint "
        f"({document['checkpoint'][:12]}…), {document['stages']} stage(s) at {document['resolution']}"
    )
    click.echo(
        f"{document['prompts']} prompt(s), seed {document['seed']}, schedule {document['schedule_name']} at levels "
        f"{levels}; guidance scale {schedule['guidance_scale']:g}"
    )
    rows = [row for index in range(document["stages"]) for row in _outliers(layers, index)]
    columns = ["layer", "stage", "lowest", "highest", f"P{document['percentile']:g} |x|", "max / P", "first / rest"]
    print_table("greatest outliers of each stage", [*columns, "uncond. / cond."], rows)
    _show_choices(document)
    for line in document["warnings"]:
        click.echo(f"Warning: {line}", err=True)


def _show_choices(document: Mapping[str, Any]) -> None:
    """What was chosen: the layers with the greatest errors, or with the greatest damage where that was measured."""
    choices = {name: layer["choice"] for name, layer in document["layers"].items()}
    migrated = sum(choice["strength"] > 0 for choice in choices.values())
    kept = [name for name, choice in choices.items() if not choice["scheme"]]
    methods = ", ".join(f"{component}={method}" for component, method in document["methods"].items())
    click.echo(
        f"for --quantize {methods}: {len(kept)} of {len(choices)} layers kept, the inputs of {migrated} migrated"
    )
    if document["trials"]:
        tried = ", ".join(f"{trial['kept']} kept: {trial['psnr']:.1f} dB" for trial in document["trials"])
        click.echo(f"to reach {document['target_psnr']:g} dB: {tried}")
    worst = sorted(choices, key=lambda name: (not choices[name]["scheme"], *_cost(choices[name])), reverse=True)
    rows = [_choice_row(name, choices[name]) for name in worst[: max(TOP, len(kept))]]
    columns = ["layer", "stored", "migration", "rounded", "chosen", "damage by stage"]
    print_table("choices, the costliest layers first", columns, rows)


def _cost(choice: Mapping[str, Any]) -> tuple[float, float]:
    return max(choice["damage"], default=0.0), choice["errors"].get("chosen", 0.0)


def _choice_row(name: str, choice: Mapping[str, Any]) -> list[str]:
    errors = [f"{choice['errors'][which]:.2e}" if which in choice["errors"] else "" for which in ("rounded", "chosen")]
    damage = " ".join(f"{value:.1e}" for value in choice["damage"])
    stored = choice["scheme"] or f"kept: {choice['reason']}"
    return [name, stored, f"{choice['strength']:g}" if choice["strength"] else "", *errors, damage]


def _outliers(layers: Mapping[str, Any], index: int) -> list[list[str]]:
    """Rows of a stage's layers with the greatest extremes beside their percentiles; one for layers of one input."""
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if index and layer["stages"][index] == {**layer["stages"][0], "stage": index}:
            continue  # a decoder's: the same in all
        names.setdefault(json.dumps(layer["stages"][index]), []).append(name)
    found = sorted(names.values(), key=lambda same: -layers[same[0]]["stages"][index]["ratio"])
    return [_row(_label(same), layers[same[0]]["stages"][index]) for same in found[:TOP]]


def _label(names: list[str]) -> str:
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _row(name: str, stage: Mapping[str, Any]) -> list[str]:
    numbers = [f"{stage[field]:.4g}" for field in ("lowest", "highest", "magnitude", "ratio")]
    return [name, str(stage["stage"]), *numbers, _ratio(stage["groups"]), _ratio(stage["passes"], last=True)]


def _ratio(parts: Mapping[str, float], *, last: bool = False) -> str:
    """Of the first of two to the second, or the other way round; nothing where there is one."""
    if len(parts) < 2:
        return ""
    a, b = parts.values()
    return f"{b / a if last else a / b:.3f}"
