"""Which of the two libraries is at work: TensorRT, or TensorRT for RTX, which builds without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from ...runtime.errors import UsageError
from .cuda import Cuda

__all__ = [
    "MODULES",
    "building_library",
    "capabilities_to_build",
    "check_library",
    "import_library",
    "installed_version",
]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Module of each distribution."""


def installed_version(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_library(name: str, built: str) -> None:
    """Refuse engines that what is installed does not load.

    Raises:
        UsageError: the library that built them is not installed, or in another version.
    """
    if name not in MODULES:
        raise UsageError(f"built for {name} {built}, expected one of {' or '.join(MODULES)}: build the bundle again")
    found = installed_version(name)
    if found is None:
        raise UsageError(f"built for {name} {built}, which is not installed: pip install {name}=={built} cuda-bindings")
    if found != built:
        raise UsageError(f"built for {name} {built}, found {found}: install {name}=={built}, or build the bundle again")


def building_library(asked: str = "") -> str:
    """Distribution that builds here: what is asked for, or `tensorrt` where it and a GPU are, else `tensorrt-rtx`.

    Raises:
        UsageError: what is asked for, or either of them, cannot build here.
    """
    if asked:
        if installed_version(asked) is None:
            raise UsageError(f"{asked} is not installed: pip install {asked} cuda-bindings, or leave out --library")
        if asked == "tensorrt" and _gpu() is None:
            raise UsageError("tensorrt builds for the GPU that is here, and none is: take --library tensorrt-rtx")
        return asked
    if installed_version("tensorrt") and _gpu() is not None:
        return "tensorrt"
    if installed_version("tensorrt-rtx"):
        return "tensorrt-rtx"
    raise UsageError(
        "target 'trt' needs tensorrt-rtx, which builds without a GPU, or tensorrt and a GPU: "
        "pip install 'pyrexport[export,trt]'"
    )


def capabilities_to_build(library: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Compute capabilities that a library builds an engine for.

    Raises:
        UsageError: one is malformed or not known to the library, TensorRT is asked for another than the GPU that is
            here, or nothing is asked and no GPU is here.
    """
    here = _gpu()
    if not asked and here is None:
        raise UsageError("no GPU is here to build for: give --compute-capability, such as --compute-capability 8.9")
    wanted = tuple(dict.fromkeys(asked)) or (str(here),)
    if library == "tensorrt":
        known = [str(here)]
    else:
        members = import_library(library).ComputeCapability.__members__
        known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
    unknown = next((capability for capability in wanted if capability not in known), None)
    if unknown is not None:
        raise UsageError(
            f"{library} {installed_version(library)} builds here for compute capability {' or '.join(known)}, "
            f"found '{unknown}'"
            + ("; for another, build with tensorrt on a machine with that GPU" if library == "tensorrt-rtx" else "")
        )
    return wanted


def _gpu() -> str | None:
    """Compute capability of the GPU that is here, if one is."""
    try:
        return Cuda().capability()
    except UsageError:
        return None


def import_library(distribution: str) -> ModuleType:
    """The module of a distribution.

    Raises:
        UsageError: it is no such distribution, is not installed, or does not load.
    """
    if distribution not in MODULES:
        raise UsageError(f"expected an engine of {' or '.join(MODULES)}, found one of '{distribution:.40}'")
    try:
        return import_module(MODULES[distribution])
    except ImportError as error:
        raise UsageError(
            f"{distribution} is missing or does not load ({error}): "
            f"pip install {distribution} in the version of the bundle"
        ) from error


Listener = Callable[[Any, str], None]
_loggers: dict[int, tuple[Any, Any, list[Listener]]] = {}


@contextmanager
def listening(trt: Any, listener: Listener) -> Iterator[Any]:
    """The process's logger of a library, which tells a listener what is logged meanwhile.

    A library takes the first logger that it is given and ignores all later ones.
    """
    if id(trt) not in _loggers:
        listeners: list[Listener] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                for tell in list(listeners):
                    tell(severity, message)

        _loggers[id(trt)] = trt, Logger(), listeners
    _, logger, listeners = _loggers[id(trt)]
    listeners.append(listener)
    try:
        yield logger
    finally:
        listeners.remove(listener)
