"""Files that are there whole or not at all, and the folder for what can be made again."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

from .errors import UsageError

__all__ = [
    "LEFT_BEHIND",
    "MANIFEST_FILE",
    "cache_folder",
    "check_output",
    "check_outside_bundles",
    "file_digest",
    "is_left_behind",
    "is_partial",
    "refuse_pointer",
    "sync_file",
    "sync_folder",
    "write_whole",
    "written_beside",
]

MANIFEST_FILE = "manifest.json"
"""What makes a folder a bundle."""

LEFT_BEHIND = (
    ".cache",  # downloads into a folder: what was fetched, and its locks
    ".huggingface",  # the same, by older clients
    ".git",  # repositories: their history, and what is said of them
    ".gitattributes",
    ".gitignore",
    "README.md",
    "LICENSE*",
    ".DS_Store",  # macOS: how a window shows the folder
    "._*",  # macOS: what another file system cannot keep of a file
    "__MACOSX",  # the same, in archives
    "Icon\r",
    ".apdisk",
    ".Trash*",
    ".nfs*",  # file systems: files that were removed while they were open
    ".fuse_hidden*",
    ".smbdelete*",
    "lost+found",
    "@eaDir",  # network storage: indexes and thumbnails
    "[Tt]humbs.db",  # Windows
    "desktop.ini",
    ".directory",  # KDE
    ".ipynb_checkpoints",
)
"""Names of what downloads and file systems leave in a folder, as patterns: nobody put it there on purpose."""

_POINTER = b"version https://git-lfs"

_numbers = count()
_TOKEN = os.urandom(4).hex()  # processes of two machines that share a folder may have the same number


def cache_folder() -> Path:
    """Where pyrexport keeps what it can make again; it may not exist, and may not be writable."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # to be ignored, by the specification of base directories
        root = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "pyrexport"


def check_output(path: Path, *, folder: bool = False) -> None:
    """Refuse a file (or a folder) that could not be written, before the work that it is for.

    Raises:
        UsageError: its parent is missing or not writable, something of another kind is there, or its name is too long.
    """
    if not path.name:
        raise UsageError(f"'{path}' is no output: expected the name of a file or a folder")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"folder {path.parent} of the output does not exist; make it first")
    try:  # permissions say too little: of mounts that are read-only, and to root
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UsageError(
            f"folder {path.parent} of the output is not writable ({error.strerror}); choose another"
        ) from None
    if len(os.fsencode(path.name)) > 255:
        raise UsageError(f"the name of the output is longer than 255 bytes: {path.name[:40]}…")
    if path.is_dir() and not folder:
        raise UsageError(f"{path} is a folder: expected the name of a file")
    if folder and path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: expected the name of a folder")


def check_outside_bundles(path: Path) -> None:
    """Refuse an output that would lie in a bundle.

    Raises:
        UsageError: it would.
    """
    if (path.absolute().parent / MANIFEST_FILE).is_file():
        raise UsageError(f"{path.parent} is a bundle, which holds its own files alone: choose another folder")


@contextmanager
def written_beside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to, made durable and renamed to `path` when all went well, and removed when not."""
    check_output(path)
    partial = path.with_name(f".{os.getpid()}.{_TOKEN}.{next(_numbers)}.partial{path.suffix}")
    try:
        yield partial
        if durable:
            sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether a file's name is one that `written_beside` writes to."""
    process, _, rest = name.removeprefix(".").partition(".")
    return name.startswith(".") and process.isdecimal() and ".partial" in rest


def is_left_behind(name: str) -> bool:
    """Whether a name is one of `LEFT_BEHIND`."""
    return any(fnmatchcase(name, pattern) for pattern in LEFT_BEHIND)


def refuse_pointer(path: Path) -> None:
    """Refuse what Git left in a file's place because Git LFS, which holds the file, was not there.

    Raises:
        UsageError: the file is such a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UsageError(f"{path} is a Git-LFS pointer, not the file itself: run 'git lfs pull' in its repository")


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, durable before it is there under its name."""
    with written_beside(path) as partial:
        partial.write_bytes(data)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb" if os.name == "posix" else "r+b") as file:  # Windows syncs what may be written
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, where a folder can be opened: Windows has no such thing."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(
    path: Path, advance: Callable[[int], None] | None = None, *, start: int = 0, end: int | None = None
) -> str:
    """SHA-256 of a file, or of its bytes from `start` to `end`, read in pieces of at most 8 MiB."""
    digest = hashlib.sha256()
    left = (path.stat().st_size if end is None else end) - start
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while piece := file.read(min(8 * 1024 * 1024, left)):
            left -= len(piece)
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()
