"""The two ways in which pyrexport refuses: a request that cannot be met, and a check that failed."""

__all__ = ["CheckFailed", "PyrexportError", "UsageError"]


class PyrexportError(Exception):
    """Base of all errors that a user can cause; its text is one line that says what to do."""

    exit_code = 1


class UsageError(PyrexportError, ValueError):
    """Bad input: what was expected, what was found, and what to do (exit code 2)."""

    exit_code = 2


class CheckFailed(PyrexportError):
    """The input was fine and the answer is no: parity out of tolerance, a hash that differs (exit code 1)."""
