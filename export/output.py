"""Writing a bundle's folder: beside, locked, synced, and renamed into place."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.bundle import is_bundle
from ..runtime.errors import UsageError

__all__ = ["check_output", "locked", "swap", "sync_folder", "write_synced"]


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that is in the way, before any work; put back a bundle whose replacement was interrupted.

    Raises:
        UsageError: the output exists, and is not a bundle that may be replaced.
    """
    old = _replaced(output)
    if old.exists() and not os.path.lexists(output):
        old.rename(output)  # an earlier replacement was interrupted between its two renames
    if not output.absolute().parent.is_dir():
        raise UsageError(f"folder {output.absolute().parent} of the output does not exist; make it first")
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"{output} exists: give --force to replace it")
    if not is_bundle(output):
        raise UsageError(f"{output} exists and is not a bundle: only a bundle is replaced; remove it yourself")


def _replaced(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")


def swap(partial: Path, output: Path) -> None:
    """Rename a finished folder into place; what was there is removed after."""
    old = _replaced(output)
    if os.path.lexists(output):
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    partial.rename(output)
    sync_folder(output.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Hold a folder for this build alone.

    Raises:
        UsageError: another build holds it.
    """
    partial.mkdir(exist_ok=True)
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another build is writing {partial}: wait for it") from None
        yield
    finally:
        os.close(folder)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file beside and rename it into place, so that a part is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
