"""ONNX Runtime: one .onnx file per graph, all of them pointing into one weights file.

Registered under the entry-point group `pyrexport.targets`; see `runtime.engines.Target`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.engines import Engine, EngineOptions, Lowering, at_least

__all__ = [
    "FORM",
    "GROUPING",
    "PRECISIONS",
    "SUFFIX",
    "check_options",
    "check_version",
    "engine",
    "open_engine",
    "try_graph",
    "write_program",
]

ENGINE = "onnxruntime"
FORM = "onnx"
GROUPING = "none"
SUFFIX = ".onnx"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")


def engine() -> tuple[str, str]:
    """The engine that is installed, and its version."""
    from importlib.metadata import version

    return ENGINE, version(ENGINE)


def check_version(name: str, version: str) -> None:
    """Refuse what a newer engine wrote; see `runtime.engines.at_least`."""
    at_least(ENGINE, (name, version))


def check_options(options: EngineOptions) -> None:
    """Refuse an execution provider that is not there."""
    from .session import check_provider

    check_provider(options.provider)


def open_engine(file: Path, graph: str, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
    """Open a graph of a bundle."""
    from .session import OrtEngine

    return OrtEngine(file, specs, options)


def write_program(name: str, forms: Sequence[Any], folder: Path) -> Iterator[Lowering]:
    """Write NAME.onnx, of one graph, into a bundle's folder."""
    from .build import write_graph

    return write_graph(name, forms, folder)


def try_graph(file: Path, graph: str, specs: Mapping[str, Any]) -> int | None:
    """Nothing: the graph is stored as it was exported, and not lowered to another program. `parity` runs it."""
    return None
