"""Execution providers that are wheels of their own: registered once in a process, and the devices that they find."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime as ort

from ..runtime.errors import UsageError
from .quiet import line_of

__all__ = ["devices_of", "installed_version", "library_module"]


def installed_version(wheel: str, who: str, install: str) -> str:
    """Version of a wheel.

    Args:
        wheel: its name.
        who: what needs it, for people.
        install: what pip is to be told.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return version(wheel)
    except PackageNotFoundError:
        raise UsageError(f"{who} needs {wheel}: pip install '{install}'") from None


def library_module(wheel: str) -> Any:
    """The module of a provider's wheel, which says where its library lies; its name is the wheel's."""
    return import_module(wheel.replace("-", "_"))


@cache
def devices_of(wheel: str, provider: str) -> Sequence[Any]:
    """Devices that a provider finds here, its library registered with ONNX Runtime.

    Args:
        wheel: an installed one.
        provider: its name, which it is registered by.

    Raises:
        UsageError: the library does not load.
    """
    try:
        ort.register_execution_provider_library(provider, library_module(wheel).get_library_path())
        return [device for device in ort.get_ep_devices() if device.ep_name == provider]
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise UsageError(f"{wheel} {version(wheel)} does not load: {line_of(error)}") from error
