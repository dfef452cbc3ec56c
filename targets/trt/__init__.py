"""TensorRT and TensorRT for RTX: an engine with an optimisation profile per stage, its weights stored once.

Registered under the entry-point group `pyrexport.targets`; see `runtime.engines.Target`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.engines import Engine, EngineOptions, Lowering
from ...runtime.errors import UsageError

__all__ = [
    "FORM",
    "GROUPING",
    "PRECISIONS",
    "SUFFIX",
    "check_options",
    "check_version",
    "compute_capabilities",
    "engine",
    "open_engine",
    "try_graph",
    "write_program",
]

FORM = "network"
GROUPING = "profiles"
SUFFIX = ".engine"
PRECISIONS = ("fp32", "fp16", "bf16")


def engine() -> tuple[str, str]:
    """Distribution that builds here, and its version."""
    from .library import building_library, installed_version

    name = building_library()
    return name, installed_version(name) or ""


def check_version(name: str, version: str) -> None:
    """An engine is loaded by the library that built it, in the same version: TensorRT keeps no other compatible.

    Raises:
        UsageError: it is not installed, or in another version.
    """
    from .library import MODULES, installed_version

    if name not in MODULES:
        raise UsageError(f"built for {name} {version}, expected one of {' or '.join(MODULES)}: build the bundle again")
    found = installed_version(name)
    if found is None:
        raise UsageError(
            f"built for {name} {version}, which is not installed: pip install {name}=={version} cuda-bindings"
        )
    if found != version:
        raise UsageError(
            f"built for {name} {version}, found {found}: install {name}=={version}, or build the bundle again"
        )


def compute_capabilities(asked: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs to build for: those that are asked for, or the one that is here.

    Raises:
        UsageError: one is malformed or unknown, TensorRT builds for another than the one that is here, or none is.
    """
    from .library import capabilities_to_build

    return capabilities_to_build(asked)


def check_options(options: EngineOptions) -> None:
    """Refuse what TensorRT does not have.

    Raises:
        UsageError: threads, prepacking or an execution provider was asked for.
    """
    if options.provider or options.threads or options.prepack:
        raise UsageError(
            "target 'trt' runs on a GPU: it has no threads, no prepacking and no execution providers; leave them out"
        )


def open_engine(file: Path, graph: str, specs: Mapping[str, Any], options: EngineOptions) -> Engine:
    """Open a profile of an engine of a bundle."""
    from .session import TrtEngine

    return TrtEngine(file, graph, specs)


def write_program(name: str, forms: Sequence[Any], folder: Path) -> Iterator[Lowering]:
    """Write NAME.engine, of one network, with a profile for each of its graphs."""
    from .build import write_engine

    (form,) = forms
    return write_engine(form, folder / f"{name}{SUFFIX}")


def try_graph(file: Path, graph: str, specs: Mapping[str, Any]) -> int | None:
    """Nothing: the machine that builds needs no GPU. `scripts/gpu_check.py` and `parity` run it on one."""
    return None
