"""Reading JSON that somebody else wrote: typed fields, and errors that name the field."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError
from .files import refuse_pointer

__all__ = ["MAX_INTEGER", "Fields", "is_number", "read_json"]

MAX_INTEGER = 2**53 - 1
"""Largest whole number that every JSON reader keeps."""

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: the file is missing, is a Git-LFS pointer, or is not a JSON object.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError):
            refuse_pointer(path)
        raise UsageError(f"{path} is malformed: expected a JSON object, found {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is malformed: expected a JSON object, found {type(document).__name__}")
    return document


class Fields:
    """The fields of one JSON object, each read with its type."""

    def __init__(self, document: Any, source: str) -> None:
        """Wrap an object; `source` names it in errors.

        Raises:
            UsageError: it is not an object.
        """
        if not isinstance(document, Mapping):
            raise UsageError(f"{source}: expected an object, found {_short(document)}")
        self.document = document
        self.source = source

    def only(self, names: Iterable[str]) -> None:
        """Refuse fields of other names."""
        unknown = sorted(set(self.document) - set(names))
        if unknown:
            raise UsageError(f"{self.source}: unknown field '{unknown[0]}': expected {', '.join(names)}")

    def wrong(self, name: str, expected: str) -> UsageError:
        """The error for a field that is not what it should be."""
        if name not in self.document:
            return UsageError(f"{self.source}: field '{name}' is missing: expected {expected}")
        return UsageError(f"{self.source}: field '{name}': expected {expected}, found {_short(self.document[name])}")

    def get(self, name: str, expected: str, valid: Callable[[Any], bool], default: Any = None) -> Any:
        """A field that satisfies `valid`; the default, where one is given, if it is absent or null."""
        value = self.document.get(name)
        if value is None and default is not None:
            return default
        if not valid(value):
            raise self.wrong(name, expected)
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, not below `least`."""
        value = self.get(
            name,
            f"a whole number from {least} to {MAX_INTEGER}",
            lambda v: type(v) is int and least <= v <= MAX_INTEGER,
            default,
        )
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        return float(self.get(name, "a number", is_number, default))

    def text(self, name: str, default: str | None = None, *, choices: Iterable[str] = ()) -> str:
        """A string, one of `choices` if there are any."""
        allowed = tuple(choices)
        expected = f"one of {', '.join(allowed)}" if allowed else "a string"
        value = self.get(name, expected, lambda v: isinstance(v, str) and (not allowed or v in allowed), default)
        return str(value)

    def numbers(self, name: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.get(name, "a list of numbers", lambda v: isinstance(v, list) and all(map(is_number, v)), default)
        return tuple(float(v) for v in value)

    def object(self, name: str) -> "Fields":
        """A nested object."""
        return Fields(self.get(name, "an object", lambda v: isinstance(v, dict)), f"{self.source}: {name}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
