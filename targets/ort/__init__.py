"""ONNX Runtime: one .onnx file per graph, all of them pointing into one weights file.

Registered under the entry-point group `pyrexport.targets`; see `runtime.engines.Target`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.engines import Engine, EngineOptions

__all__ = ["ENGINE", "build_graph", "check_options", "engine_version", "open_engine"]

ENGINE = "onnxruntime"


def engine_version() -> str:
    """Version of the engine that is installed."""
    from importlib.metadata import version

    return version(ENGINE)


def check_options(options: EngineOptions) -> None:
    """Refuse an execution provider that is not there."""
    from .session import check_provider

    check_provider(options.provider)


def open_engine(file: Path, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
    """Open a graph of a bundle."""
    from .session import OrtEngine

    return OrtEngine(file, specs, options)


def build_graph(form: Any, folder: Path) -> str:
    """Write a graph into a bundle's folder; returns the file's name."""
    from .build import write_graph

    return write_graph(form, folder)
