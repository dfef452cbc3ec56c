"""Engines: what runs a graph of a bundle, and the targets that have one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..documents import Fields
from ..errors import UsageError
from .graphs import GraphSpec, TensorSpec

__all__ = [
    "GROUP",
    "MAX_THREADS",
    "Engine",
    "EngineOptions",
    "Facts",
    "Held",
    "HoldingEngine",
    "Option",
    "Table",
    "Target",
    "at_least",
    "check_inputs",
    "check_own",
    "find_target",
    "installed_targets",
    "target_names",
]

GROUP = "pyrexport.targets"

MAX_THREADS = 1024
"""Most threads that can be asked for."""

Facts = Mapping[str, Any]
"""What a target found out about a graph when it wrote it, as JSON: its session is given them."""


class Engine(Protocol):
    """One graph, loaded."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph on NumPy arrays of its fixed shapes."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Held(Protocol):
    """A flat array that stays where an engine computed it, until nobody refers to it.

    A part of it is one too, and is taken by every graph of the engine's target; `np.asarray` fetches it.
    """

    def __getitem__(self, part: slice, /) -> "Held":
        """Its values from the slice's start to its stop."""
        ...

    def __array__(self) -> NDArray[Any]:
        """Its values."""
        ...


@runtime_checkable
class HoldingEngine(Engine, Protocol):
    """An engine with a memory of its own, which can keep an output there for the next run."""

    def run_held(self, inputs: Mapping[str, "NDArray[Any] | Held"]) -> "NDArray[Any] | Held":
        """Evaluate a graph whose only output is flat; it is held, or fetched where there is no room for it."""
        ...


@dataclass(frozen=True)
class Option:
    """An option that only one target has; its default, an empty value, means that it was not given."""

    name: str
    """The option's name in Python."""
    flag: str
    """The option's name on the command line."""
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    """It may be given more than once; its value is a tuple of strings."""
    switch: bool = False
    """It takes no value: True where it is given."""
    listing: "Callable[[], Table] | None" = None
    """What the value `list` shows, in place of doing anything."""

    @property
    def default(self) -> Any:
        """The value where it is not given."""
        return () if self.many else False if self.switch else ""

    def check(self, value: Any) -> Any:
        """The value, as its type says.

        Raises:
            UsageError: it is of another type, or none of the choices.
        """
        if self.many and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if not self.many and isinstance(value, bool if self.switch else str):
            if value and self.choices and value not in self.choices:
                raise UsageError(f"unknown {self.name} '{value}': expected one of {', '.join(self.choices)}")
            return value
        kind = "a list of strings" if self.many else "true or false" if self.switch else "a string"
        raise UsageError(f"{self.name}: expected {kind}, found {value!r:.60}")


def check_own(target: str, known: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """A value for each of a target's own options.

    Raises:
        UsageError: a value is given to an option that the target does not have, or is none that it takes.
    """
    names = {option.name: option for option in known}
    for name in given:
        if name not in names:
            own = f"it has {', '.join(names)}" if names else "it has none of its own"
            raise UsageError(f"target '{target}' has no option '{name}': {own}; leave it out")
    return {name: option.check(given.get(name, option.default)) for name, option in names.items()}


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened."""

    threads: int = 0
    """Threads of one operator; 0: one for each usable core."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """The target's own options that were given, by name."""


@dataclass(frozen=True)
class Table:
    """What a target shows of its graphs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Target(ABC):
    """What runs the graphs of a bundle: the object that an entry point of the group `pyrexport.targets` names.

    The facts and methods here are those that running needs; what building needs is added in `targets.facts`.
    """

    name: str
    needs_device: bool = False
    """Graphs run on a device, which may not be where they are built: open a session before anything that takes long."""
    loads_whole_files: bool = False
    """Graphs of one file are loaded together: one that is open costs the others nothing, and all stay open."""
    process_bytes: int = 40 * 2**20
    """Anonymous memory of a process with an engine that is open, before it runs."""
    engine_options: tuple[Option, ...] = ()
    """Options of its engine, beside threads."""

    @abstractmethod
    def check_version(self, name: str, version: str) -> None:
        """Refuse what another engine wrote, or a version that does not fit the installed one.

        Raises:
            UsageError: it is so; the message begins with "built for".
        """

    def check_engine_options(self, options: EngineOptions) -> None:
        """Refuse values that its engine does not have here.

        Raises:
            UsageError: there is one.
        """
        check_own(self.name, self.engine_options, options.own)

    def check_facts(self, facts: Fields) -> None:
        """Check what a manifest holds of a graph's facts, as far as this target reads it.

        Raises:
            UsageError: a fact is not what the target writes.
        """
        return

    def gpus(self, options: EngineOptions) -> int:
        """GPUs that a process takes whose engines are opened so: what a cluster shares out."""
        return 0

    def remark(self) -> str:
        """What people should know of measurements that are taken here; empty: nothing."""
        return ""

    def table(self, facts: Mapping[str, Facts]) -> Table | None:
        """What people are shown of the facts of all graphs, by name."""
        return None

    @abstractmethod
    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """Open a graph of a file; imports the engine and NumPy alone.

        Raises:
            UsageError: the engine refuses it, or it is not the graph of its specification.
        """

    def open_model(self, model: bytes, folder: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """Open an ONNX graph that is no bundle's, whose external data lie in a folder.

        Raises:
            UsageError: the target evaluates no ONNX graphs, or refuses this one.
        """
        raise UsageError(f"target '{self.name}' evaluates no ONNX graphs: its own are of another form")


def target_names() -> list[str]:
    """Names of the targets that are installed."""
    return sorted(entry_points(group=GROUP).names)


def installed_targets() -> Iterator[Target]:
    """The targets that load here, by name; one whose package is broken is left to those who ask for it by name."""
    for name in target_names():
        try:
            yield find_target(name)
        except UsageError:
            continue


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: no installed package provides it, or its package does not load.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        raise UsageError(f"unknown target '{name}': expected one of {', '.join(target_names())}")
    try:
        target = found[0].load()
    except ImportError as error:
        raise UsageError(f"target '{name}' cannot run here: {error}; install its engine") from error
    if not isinstance(target, Target):
        raise UsageError(f"target '{name}': its entry point names {target!r:.80}, expected a Target")
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


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Any], kinds: tuple[type, ...] = ()) -> None:
    """Refuse inputs that are not the graph's: NumPy's arrays, or those of other kinds.

    Raises:
        UsageError: an input is missing, extra, or of another shape or dtype.
    """
    for spec in specs:
        if spec.name not in inputs:
            raise UsageError(f"input '{spec.name}' is missing: expected {spec.dtype} {list(spec.shape)}")
        value = inputs[spec.name]
        taken = isinstance(value, (np.ndarray, *kinds))
        if not taken:
            raise UsageError(f"input '{spec.name}': expected an array, found {type(value).__name__}")
        if value.shape != spec.shape or str(value.dtype) != spec.dtype:
            raise UsageError(
                f"input '{spec.name}': expected {spec.dtype} {list(spec.shape)}, "
                f"found {value.dtype} {list(value.shape)}"
            )
    names = [spec.name for spec in specs]
    extra = sorted(inputs.keys() - set(names))
    if extra:
        raise UsageError(f"unexpected input '{extra[0]}': expected {', '.join(names)}")
