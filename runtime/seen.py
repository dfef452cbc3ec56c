"""Files that were hashed before are recognised by their sizes and times, across runs."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .errors import UsageError
from .files import cache_folder, file_digest, write_whole

__all__ = ["Seen"]


class Seen:
    """SHA-256 of files, kept in the user's cache folder by path, size and times."""

    def __init__(self) -> None:
        """Read what is known."""
        self.file = cache_folder() / "verified.json"
        self.entries: dict[str, list[object]] = {}
        self.changed = False
        with suppress(OSError, ValueError):
            document = json.loads(self.file.read_text("utf-8"))
            if isinstance(document, dict):
                self.entries = document

    def digest(self, path: Path, *, again: bool = False, advance: Callable[[int], None] | None = None) -> str:
        """SHA-256 of a file.

        Args:
            path: the file.
            again: hash it even where it is known.
            advance: told the bytes as they are hashed.
        """
        key, identity = str(path.resolve()), self._identity(path)
        known = self.entries.get(key)
        if not again and isinstance(known, list) and known[:-1] == identity and isinstance(known[-1], str):
            return known[-1]
        found = file_digest(path, advance)
        self.entries[key] = [*identity, found]
        self.changed = True
        return found

    @staticmethod
    def _identity(path: Path) -> list[object]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    def save(self) -> None:
        """Keep what is known. A cache that cannot be written is no cache: hashing again is all that it costs."""
        if not self.changed:
            return
        with suppress(OSError, UsageError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(dict(list(self.entries.items())[-1000:])).encode())
