"""What native libraries say: kept from people and pipes, or told in one line."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["line_of", "silenced"]


def line_of(error: Exception) -> str:
    """What an exception of a native library says, in one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def silenced(descriptor: int) -> Iterator[None]:
    """While it lasts, nothing arrives that is written to a descriptor: 1 is standard output, 2 standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nothing = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, descriptor)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what a library printed may still lie in its buffer
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nothing)
