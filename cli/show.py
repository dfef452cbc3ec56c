"""What `inspect` found, as tables for people."""

from collections.abc import Container, Mapping
from typing import Any

import click

from ..runtime.quantisation import DECODERS
from .common import print_memory, print_table

__all__ = ["show_model"]


def show_model(document: Mapping[str, Any]) -> None:
    """Print the document of a model."""
    click.echo(f"{document['model']}: {document['kind']} at {document['resolution']}")
    if document["assumed"]:
        click.echo(f"assumed: {document['assumed']}")
    _show_stages(document["stages"])
    _show_schedules(document["schedules"])
    if "components" in document:
        print_table(
            "weights",
            ["component", "parameters", "bytes", "dtype"],
            [
                [name, f"{found['parameters']:,}", f"{found['bytes']:,}", ", ".join(found["dtypes"])]
                for name, found in document["components"].items()
            ],
        )
        return
    if len(document["resolutions"]) > 1:
        _show_resolutions(document)
    print_table("files", ["file", "bytes"], [[name, f"{size:,}"] for name, size in document["files"].items()])
    if document["engines"] is not None:
        print_table(**document["engines"])
    print_memory(document["peak_anonymous_bytes"], document["resolution"])
    click.echo(_state_of(document))


def _show_stages(stages: list[Mapping[str, Any]]) -> None:
    rows = [
        [
            str(stage["stage"]),
            "x".join(map(str, stage["latent"])),
            "x".join(map(str, stage["patch_size"])),
            f"{stage['tokens']:,}",
            f"{stage['levels'][0]:.4f} to {stage['levels'][1]:.4f}",
            f"{stage['tflop']:,.3f}" if stage["tflop"] >= 0.1 else f"{stage['tflop']:.3g}",
        ]
        for stage in stages
    ]
    columns = ["stage", "latent C,T,H,W", "patch", "tokens", "natural levels", "TFLOP per forward"]
    print_table("stages", columns, rows)


def _show_resolutions(document: Mapping[str, Any]) -> None:
    rows = [
        [
            size["resolution"],
            " ".join(f"{tokens:,}" for tokens in size["tokens"]),
            "" if size["tflop"] is None else _tflop(size["tflop"]),
            "" if size["tiles"] is None else str(size["tiles"]),
            "" if size["peak_anonymous_bytes"] is None else f"{size['peak_anonymous_bytes'] / 2**20:,.0f}",
        ]
        for size in document["resolutions"]
    ]
    columns = ["resolution", "tokens by stage", f"TFLOP of {document['default_schedule']}", "tiles", "MiB of a sample"]
    print_table("resolutions", columns, rows)


def _show_schedules(schedules: Mapping[str, Any]) -> None:
    rows = [
        [
            name + _first_chunk(schedule),
            _solver(schedule["solver"]),
            _guidance(schedule),
            _tflop(schedule["tflop"]),
            str(schedule["passes"]),
            _tflop(schedule["passes"] * schedule["tflop"]),
        ]
        for name, schedule in schedules.items()
    ]
    columns = ["schedule", "solver", "guidance scale", "TFLOP per pass", "passes", "TFLOP"]
    if all("tflop_later_chunk" in schedule for schedule in schedules.values()):
        columns.append("TFLOP of a later chunk")
        for row, schedule in zip(rows, schedules.values(), strict=True):
            row.append(_tflop(schedule["passes"] * schedule["tflop_later_chunk"]))
    print_table("schedules", columns, rows)


def _first_chunk(schedule: Mapping[str, Any]) -> str:
    """Steps of the first chunk, where it has others."""
    steps = "-".join(str(len(levels)) for levels in schedule.get("first_chunk", ()))
    return f" (first chunk {steps})" if steps else ""


def _guidance(schedule: Mapping[str, Any]) -> str:
    """The scale, or those of both networks."""
    second = schedule.get("guidance_scale_2")
    return f"{schedule['guidance_scale']:g}" + ("" if second is None else f", {second:g}")


def _solver(found: Any) -> str:
    """A solver's name, and its options where there are any."""
    if not isinstance(found, Mapping):
        return str(found)
    options = ", ".join(f"{key} {value}" for key, value in found.items() if key != "name")
    return f"{found['name']} ({options})"


def _tflop(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


def _proof(name: str, result: Mapping[str, Any] | None, where: str = "") -> str:
    state = f"not measured{where}" if result is None else "passed" if result.get("passed") else "FAILED"
    return f"{name} {state}"


def _storage(precision: Mapping[str, str], quantised: Mapping[str, str], missing: Container[str]) -> str:
    """What the transformer is stored in, and where other components that are there differ."""
    there = {name: scheme for name, scheme in precision.items() if name != "compute" and name not in missing}
    stored = {name: quantised.get(name, scheme) for name, scheme in there.items()}
    main = stored.pop("transformer")
    others = [f"{name} in {scheme}" for name, scheme in stored.items() if scheme != main]
    return main + (f" ({', '.join(others)})" if others else "")


def _state_of(document: Mapping[str, Any]) -> str:
    precision = document["precision"]
    if document["needs_device"]:
        graph, engine = document["graph_parity"], document["parity"]
        proof = f"{_proof('graph parity', graph)}, {_proof('engine parity', engine, ' on a device')}"
    else:
        proof = _proof("parity", document["parity"])
    decoders = document["decoders"]
    missing = DECODERS.values() - decoders.keys()
    how = " or ".join(
        _decoded(name, decoders[component]) for name, component in DECODERS.items() if component in decoders
    )
    verified = "; every file hashed again" if document["verified"] else ""
    return (
        f"built for {document['engine']}; stored in {_storage(precision, document['quantised'], missing)}"
        f", computed in {precision['compute']}; {f'frames decoded {how}; ' if how else ''}{proof}{verified}"
    )


def _decoded(name: str, decoder: Mapping[str, Any]) -> str:
    """How one of the decoders does it."""
    if decoder["tiles"] == 1:
        return f"by the {name} decoder"
    size = "x".join(map(str, decoder["tile"]))
    return (
        f"by the {name} decoder in {decoder['tiles']} tiles of {size} latent pixels, "
        f"{decoder['overhead']:.2f} x the frame"
    )
