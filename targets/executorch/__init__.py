"""ExecuTorch: one program for all stages, one for the text encoder and one for the decoder, lowered to XNNPACK.

Registered under the entry-point group `pyrexport.targets`; see `runtime.engines.Target`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.engines import Engine, EngineOptions, Lowering, at_least
from ...runtime.errors import UsageError

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

ENGINE = "executorch"
FORM = "torch"
GROUPING = "methods"
SUFFIX = ".pte"
PRECISIONS = ("fp32",)


def engine() -> tuple[str, str]:
    """The engine that is installed, and its version."""
    from importlib.metadata import version

    return ENGINE, version(ENGINE)


def check_version(name: str, version: str) -> None:
    """Refuse what a newer engine wrote; see `runtime.engines.at_least`."""
    at_least(ENGINE, (name, version))


def check_options(options: EngineOptions) -> None:
    """Refuse what ExecuTorch does not have; its weights are always packed.

    Raises:
        UsageError: an execution provider was asked for.
    """
    if options.provider:
        raise UsageError(f"executorch has no execution providers, found '{options.provider}': leave it out")


def open_engine(file: Path, graph: str, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
    """Open a method of a program of a bundle."""
    from .session import ExecutorchEngine

    return ExecutorchEngine(file, graph, specs, options)


def write_program(name: str, forms: Sequence[Any], folder: Path) -> Iterator[Lowering]:
    """Write NAME.pte with a method for each form; yields a line on each: what XNNPACK took of it.

    Raises:
        UsageError: ExecuTorch is here without what it needs to lower.
    """
    try:
        from .build import write_program
    except ImportError as error:
        raise UsageError(
            f"executorch is installed without its dependencies, which is enough to run and not to build ({error}): "
            "pip install 'pyrexport[export,executorch]'"
        ) from error

    return write_program(folder / f"{name}{SUFFIX}", forms)


def try_graph(file: Path, graph: str, specs: Mapping[str, Any]) -> int | None:
    """Load and run a method: lowering can succeed, and either of them still fail."""
    from .build import try_method

    return try_method(file, graph, specs)
