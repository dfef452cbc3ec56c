"""Writing a bundle's folder: beside, locked, synced, and renamed into place."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...runtime.bundle.opening import is_bundle
from ...runtime.errors import UsageError
from ...runtime.files import is_left_behind, is_partial, sync_folder
from ...runtime.reporter import Reporter

__all__ = ["STATE_FILE", "check_replaceable", "locked", "partial_of", "swap"]

STATE_FILE = "journal.json"
"""What is finished in a folder that a build is working on. A folder without it is somebody else's."""

NO_LOCKS = (errno.EBADF, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks raise: NFS, Lustre, some of FUSE."""


def check_replaceable(output: Path, force: bool) -> None:
    """Refuse an output that is in the way; put back a bundle whose replacement was interrupted.

    Raises:
        UsageError: the output exists and is not a bundle that may be replaced, or a folder beside it is in the way.
    """
    if not output.absolute().name:
        raise UsageError(f"{output} cannot be a bundle: expected the name of a folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"folder {output.absolute().parent} of the output does not exist; make it first")
    partial = partial_of(output)
    _put_back(output, partial)
    if os.path.lexists(partial) and not _is_ours(partial):
        raise UsageError(f"{partial} is in the way and was not made by a build: move it away")
    if not os.path.lexists(output):
        return
    if output.is_symlink():
        raise UsageError(f"{output} is a symbolic link: give the folder that it points to")
    if not force:
        raise UsageError(f"{output} exists: give --force to replace it")
    if not is_bundle(output):
        raise UsageError(f"{output} exists and is not a bundle: only a bundle is replaced; remove it yourself")


def _put_back(output: Path, partial: Path) -> None:
    """The bundle whose replacement was interrupted between its two renames; another build may be between them now."""
    old = _replaced(output)
    if is_bundle(old) and not os.path.lexists(output):
        if not partial.is_dir():
            old.rename(output)
            return
        with locked(partial):
            if not os.path.lexists(output):
                old.rename(output)


def partial_of(output: Path) -> Path:
    """The folder that a build works in."""
    return output.absolute().with_name(output.absolute().name + ".partial")


def _is_ours(partial: Path) -> bool:
    """Whether a build left the folder, killed at any instant: before its first state, amid its work, or at the end."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {path.name for path in partial.iterdir() if not is_left_behind(path.name)}
    return STATE_FILE in names or all(map(is_partial, names)) or is_bundle(partial)


def _replaced(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.replaced")


def swap(partial: Path, output: Path, force: bool) -> None:
    """Rename a finished folder into place; a bundle that was there is removed after.

    Raises:
        UsageError: something came into the way since the build began; the finished parts are kept.
    """
    if os.path.lexists(output) and not (force and is_bundle(output)):
        raise UsageError(f"{output} appeared during the build: move it away and run again; the finished parts are kept")
    kept = _kept(partial)
    with suppress(FileNotFoundError):
        (partial / STATE_FILE).replace(kept)
    sync_folder(partial)
    old = _replaced(output)
    if os.path.lexists(output):
        if is_bundle(old):
            shutil.rmtree(old)
        output.rename(old)
    partial.rename(output)
    sync_folder(output.absolute().parent)
    kept.unlink(missing_ok=True)
    if is_bundle(old):
        shutil.rmtree(old)


def _kept(partial: Path) -> Path:
    """Where the state waits while its folder, finished, is renamed into place."""
    return partial.with_name(f".{partial.name}.{STATE_FILE}")


@contextmanager
def locked(partial: Path, reporter: Reporter | None = None) -> Iterator[None]:
    """Hold a folder for this build alone; where there are no locks, say so and go on without.

    Raises:
        UsageError: another build holds it.
    """
    partial.mkdir(exist_ok=True)
    with _lock(partial, reporter or Reporter()):
        if _kept(partial).is_file() and not (partial / STATE_FILE).exists():
            _kept(partial).replace(partial / STATE_FILE)  # a build stopped before its last renames
        yield


@contextmanager
def _lock(partial: Path, reporter: Reporter) -> Iterator[None]:
    fcntl = _locks()
    if fcntl is None:
        reporter.warned(f"{partial} cannot be locked on this system: start no second build of it")
        yield
        return
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another build is writing {partial}: wait for it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reporter.warned(f"{partial} lies on a file system without locks ({error.strerror}): start no second build")
        yield
    finally:
        os.close(folder)


def _locks() -> Any:
    """The module of locks; None on Windows, which has none."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl
