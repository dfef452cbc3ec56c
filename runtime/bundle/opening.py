"""Opening a bundle: every file there, nothing else there, and each one what the manifest says.

A file may be a link, as in the hub's cache; what counts is where it leads. `files.LEFT_BEHIND` is not counted.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..chain.pyramid import Resolution
from ..documents import read_json
from ..errors import CheckFailed, UsageError
from ..files import is_left_behind, refuse_pointer
from ..seen import Seen
from .entries import FileEntry
from .manifest import MANIFEST_FILE, Manifest, parse_manifest

__all__ = ["Bundle", "is_bundle", "open_bundle"]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked against its manifest."""

    folder: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.folder / name


def is_bundle(path: Path) -> bool:
    """Whether a path is a bundle's folder."""
    return (path / MANIFEST_FILE).is_file()


def open_bundle(
    folder: Path,
    *,
    resolution: Resolution | None = None,
    decoder: str | None = None,
    verify: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Bundle:
    """Read and check a bundle.

    A file is hashed in full when it is first seen, and recognised by its size and times later on.

    Args:
        folder: the bundle's folder.
        resolution: that it is to sample at; None: its first.
        decoder: that it is to decode with, a name of `DECODERS`; None: its first.
        verify: hash every file again.
        advance: told the bytes as they are hashed.

    Raises:
        UsageError: it is not a bundle, cannot be read, its manifest is malformed, it has no such resolution or
            decoder, or a file is a Git-LFS pointer.
        CheckFailed: a file is missing, extra, no plain file, or not what the manifest says.
    """
    _require_bundle(folder)
    source = folder / MANIFEST_FILE
    manifest = parse_manifest(read_json(source), str(source)).at(resolution).decoding(decoder)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST_FILE}
    missing, others = sorted(manifest.files.keys() - present), sorted(present - manifest.files.keys())
    extra = [name for name in others if not is_left_behind(name)]
    if missing:
        raise CheckFailed(f"{folder / missing[0]} is missing: the manifest lists it; fetch the bundle again")
    for name in manifest.files:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    if extra:
        raise CheckFailed(f"{folder / extra[0]} is not part of the bundle: the manifest does not list it; remove it")
    seen = Seen()
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry, seen, verify, advance)
    seen.save()
    return Bundle(folder, manifest)


def _require_bundle(folder: Path) -> None:
    try:
        found = is_bundle(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}; expected the folder of a bundle") from None
    if not found:
        raise UsageError(f"{folder} is not a bundle: expected a folder with {MANIFEST_FILE}")


def _check_file(path: Path, entry: FileEntry, seen: Seen, verify: bool, advance: Callable[[int], None] | None) -> None:
    if not path.is_file():
        found = f"a link to {os.readlink(path)}, which is none" if path.is_symlink() else "something else"
        raise CheckFailed(f"{path}: expected a plain file or a link to one, found {found}; fetch the bundle again")
    size = path.stat().st_size
    if size != entry.nbytes:
        refuse_pointer(path)
        raise CheckFailed(f"{path}: expected {entry.nbytes} bytes, found {size}; fetch the bundle again")
    found = seen.digest(path, again=verify, advance=advance)
    if found != entry.sha256:
        raise CheckFailed(
            f"{path} is damaged: expected SHA-256 {entry.sha256[:16]}…, found {found[:16]}…; fetch the bundle again"
        )
