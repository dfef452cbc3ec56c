"""The two ways in which pyrexport refuses: a request that cannot be met, and a check that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["CheckFailed", "PyrexportError", "UsageError", "noted"]


class PyrexportError(Exception):
    """Base of all errors that a user can cause; its text is one line that says what to do."""

    exit_code = 1


class UsageError(PyrexportError, ValueError):
    """Bad input: what was expected, what was found, and what to do (exit code 2)."""

    exit_code = 2


class CheckFailed(PyrexportError):
    """The input was fine and the answer is no: parity out of tolerance, a hash that differs (exit code 1)."""


@contextmanager
def noted(line: str, applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """While it lasts, errors and interrupts carry a line more, where it applies when they come."""
    try:
        yield
    except BaseException as error:
        if applies():
            error.add_note(line)
        raise
