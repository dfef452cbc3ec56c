"""Components that a checkpoint takes from a sibling, so that models that share them need no copies.

`pyramid.json` names each by its path, which stays inside the folder that both checkpoints lie in, and by a hash of
all its files: `"components": {"vae": {"path": "../other/vae", "sha256": "…"}}`.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ..documents import Fields
from ..errors import UsageError
from ..files import is_left_behind
from ..seen import Seen

__all__ = ["COMPONENT_FOLDERS", "component_folders", "folder_digest"]

COMPONENT_FOLDERS = ("transformer", "transformer_2", "text_encoder", "tokenizer", "vae", "tiny_decoder")


def folder_digest(folder: Path, digest_of: Callable[[Path], str]) -> str:
    """SHA-256 of a folder's files: of the lines "NAME SHA-256", by name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    lines = [f"{name} {digest_of(files[name])}" for name in sorted(files) if not is_left_behind(files[name].name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def component_folders(folder: Path, fields: Fields) -> dict[str, Path]:
    """Where each component of a checkpoint lies: in its folder, or in a sibling's.

    Args:
        folder: the checkpoint's.
        fields: its `pyramid.json`.

    Raises:
        UsageError: a path leaves the folder that holds the checkpoint, leads to no folder, or to one with another
            hash; or the component is in the checkpoint too.
    """
    found = {name: folder / name for name in COMPONENT_FOLDERS}
    if "components" not in fields.document:
        return found
    components = fields.object("components")
    components.only(COMPONENT_FOLDERS)
    seen = Seen()
    for name in components.document:
        if os.path.lexists(folder / name):
            raise UsageError(f"{components.source}: {name} is also in {folder}: keep one of the two")
        found[name] = _sibling(folder, components.object(name), seen)
    seen.save()
    return found


def _sibling(folder: Path, entry: Fields, seen: Seen) -> Path:
    entry.only(("path", "sha256"))
    path, expected = entry.text("path"), entry.text("sha256")
    around = folder.resolve().parent
    sibling = (folder / path).resolve()
    if Path(path).is_absolute() or around not in sibling.parents:
        raise entry.wrong("path", f"a relative path inside {around}, links followed")
    if not sibling.is_dir():
        raise entry.wrong("path", f"a folder: {sibling} is none; fetch the checkpoint that it is of")
    digest = folder_digest(sibling, seen.digest)
    if digest != expected:
        raise entry.wrong("sha256", f"{digest}, that of {sibling}")
    return sibling
