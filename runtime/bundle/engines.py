"""Engines: what runs a graph of a bundle, and how one is found."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = [
    "GROUP",
    "MAX_THREADS",
    "Engine",
    "EngineOptions",
    "Lowering",
    "Target",
    "at_least",
    "check_inputs",
    "find_target",
    "target_names",
]

GROUP = "pyrexport.targets"


MAX_THREADS = 1024
"""Most threads that can be asked for."""


class Engine(Protocol):
    """One graph, loaded."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph on NumPy arrays of its fixed shapes."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened."""

    threads: int = 0
    """Of one operator; 0: the engine's own choice."""
    prepack: bool = False
    """Let the engine copy weights into its own layout: faster on few tokens, private memory per graph."""
    provider: str = ""
    """Execution provider, where the engine has several."""


@dataclass(frozen=True)
class Lowering:
    """What a target found out about a graph when it wrote it."""

    line: str = ""
    """For people; empty: nothing to say."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """As JSON, for the manifest: a session is given them."""


class Target(Protocol):
    """The module that an entry point of the group `pyrexport.targets` names."""

    FORM: str
    """What it takes, of `targets.forms`: "onnx" (`OnnxForm`), "torch" (`TorchForm`) or "network" (`NetworkForm`)."""
    GROUPING: str
    """What shares a file. "none": each graph has its own; "methods": all stages, the text encoder's lengths, and the decoder's
    graphs; "profiles": graphs of one network that differ in their shapes. Of profiles, those that are open are kept open
    together: one load serves them all."""
    SUFFIX: str
    """Of its files."""
    PRECISIONS: tuple[str, ...]
    """That it can store."""

    def engine(self) -> tuple[str, str]:
        """Distribution that builds for it here, and its version.

        Raises:
            ImportError, UsageError: it is not installed.
        """
        ...

    def check_version(self, name: str, version: str) -> None:
        """Refuse what another engine wrote, or a version that does not fit the installed one.

        Raises:
            UsageError: it is so; the message begins with "built for".
        """
        ...

    def compute_capabilities(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The GPUs to build for, where nothing is asked the one that is here; called of targets of profiles alone.

        Raises:
            UsageError: one is malformed or not known, or nothing is asked and no GPU is here.
        """
        ...

    def check_options(self, options: EngineOptions) -> None:
        """Refuse options that the engine does not have here.

        Raises:
            UsageError: there is one.
        """
        ...

    def open_engine(self, file: Path, graph: str, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
        """Open a graph; imports the engine and NumPy alone."""
        ...

    def write_program(self, name: str, forms: Sequence[Any], folder: Path) -> Iterator[Lowering]:
        """Write NAME with its suffix into a bundle's folder, from the forms of its graphs; may import torch.

        Yields what it found for each graph. The file is there when the last one has come.
        """
        ...

    def try_graph(self, file: Path, graph: str, specs: Mapping[str, Any]) -> int | None:
        """Run a graph that was written once, where writing it does not yet prove that it runs.

        Returns the memory that it took beyond `measure.PROCESS_BYTES`, in bytes, or None where it was not run.

        Raises:
            CheckFailed: it does not load or run.
        """
        ...


def target_names() -> list[str]:
    """Names of the targets that are installed."""
    return sorted(entry_points(group=GROUP).names)


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: no installed package provides it, or its engine is not installed.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        raise UsageError(f"unknown target '{name}': expected one of {', '.join(target_names())}")
    try:
        target: Target = found[0].load()
    except ImportError as error:
        raise UsageError(f"target '{name}' cannot run here: {error}; install its engine") from error
    return target


def at_least(name: str, built: tuple[str, str]) -> None:
    """Refuse what another engine than `name` wrote, or a newer version: the installed one may not know its operators.

    Raises:
        UsageError: it is so, or the engine is not installed.
    """
    try:
        found = version(name)
    except PackageNotFoundError:
        raise UsageError(f"built for {' '.join(built)}, and {name} is not installed: pip install {name}") from None
    if built[0] != name or _numbers(found) < _numbers(built[1]):
        raise UsageError(f"built for {' '.join(built)}, found {name} {found}: upgrade it")


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor version; what is not a number counts as 0."""
    parts = text.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdecimal() and len(part) < 9 else 0 for part in parts)


def check_inputs(specs: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Refuse inputs that are not the graph's.

    Raises:
        UsageError: an input is missing, extra, or of another shape or dtype.
    """
    for name, spec in specs.items():
        if name not in inputs:
            raise UsageError(f"input '{name}' is missing: expected {spec['dtype']} {spec['shape']}")
        value = inputs[name]
        if not isinstance(value, np.ndarray):
            raise UsageError(f"input '{name}': expected an array, found {type(value).__name__}")
        if list(value.shape) != list(spec["shape"]) or str(value.dtype) != spec["dtype"]:
            raise UsageError(
                f"input '{name}': expected {spec['dtype']} {list(spec['shape'])}, found {value.dtype} {list(value.shape)}"
            )
    extra = sorted(inputs.keys() - specs.keys())
    if extra:
        raise UsageError(f"unexpected input '{extra[0]}': expected {', '.join(specs)}")
