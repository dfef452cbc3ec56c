"""Keeping what native libraries print about themselves from people and pipes."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["silenced"]


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
