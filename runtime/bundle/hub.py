"""Models of the hub: a model may be named ORGANISATION/NAME[@REVISION] where there is no such path.

Files come from the hub's cache if it is offline (HF_HUB_OFFLINE=1) or cannot be reached, and are fetched into it if
not; of a repository only what is needed. The hub's client is imported when such a name is given, and not before.
"""

import glob
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import UsageError
from ..model.safetensors import shards_of
from .manifest import MANIFEST_FILE, parse_manifest

__all__ = ["Choice", "find_bundle", "find_model"]

Choice = Callable[[Sequence[str], str], list[str]]
"""Of the names in a repository that is no bundle, and of what it is called, the names that are needed.

It raises a UsageError where that is nothing to fetch. Of weights in shards it gives the index in their place."""

_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


def find_bundle(bundle: str | Path) -> Path:
    """The folder of a bundle; that the hub cannot be reached is a Python warning.

    Raises:
        UsageError: as `find_model` does, the repository is no bundle, or it is no path and no name at all.
    """
    try:
        path = Path(bundle)
    except TypeError:
        raise UsageError(f"expected the folder of a bundle, or its name on the hub, found {bundle!r:.60}") from None
    return find_model(path, _refuse, warn=lambda line: warnings.warn(line, stacklevel=5))


def _refuse(names: Sequence[str], where: str) -> list[str]:
    raise UsageError(f"{where} holds no {MANIFEST_FILE} and is no bundle: `pyrexport build` makes one of a checkpoint")


def find_model(model: Path, choose: Choice, *, warn: Callable[[str], None], quiet: bool = False) -> Path:
    """The path of a model: as it is given, or the folder of the hub's cache that holds the model of that name.

    Args:
        model: a path or a name of the hub; a path that is there comes first.
        choose: what is needed of a repository that is no bundle. Of a bundle it is what its manifest lists.
        warn: told in a line that the hub cannot be reached, and that the cache is used.
        quiet: show no progress.

    Raises:
        UsageError: it has the form of a name, is no path here, and the hub or its cache does not have it.
    """
    match = _ID.fullmatch(model.as_posix())
    if match is None or os.path.lexists(model):
        return model
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UsageError(f"{model} does not exist; if it is a model of the hub: pip install 'pyrexport[hub]'") from None
    client: Any = huggingface_hub
    repository = _Repository(client, match[1], match[2])
    if client.constants.HF_HUB_OFFLINE:
        return repository.cached("the hub is offline (HF_HUB_OFFLINE)")
    if quiet:
        client.utils.disable_progress_bars()
    try:
        names = repository.names()
    except UsageError:
        raise
    except Exception as error:  # whatever the client's own client raises where there is no way to the hub
        reason = f"the hub cannot be reached ({type(error).__name__})"
        folder = repository.cached(reason)
        warn(f"{reason}: {model} is taken from its cache")
        return folder
    return repository.fetched(names, choose)


class _Repository:
    """A model's repository at a revision."""

    def __init__(self, client: Any, name: str, revision: str | None) -> None:
        self.client, self.name, self.revision = client, name, revision

    def cached(self, reason: str) -> Path:
        """Its folder in the cache; which of its files are there, the reader of the model will see."""
        try:
            return Path(self.client.snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except Exception:  # one class where nothing is there, others where a reference is broken
            place = self.client.constants.HF_HUB_CACHE
            at = f" at revision {self.revision}" if self.revision else ""
            raise UsageError(
                f"{self.name} is no path here, {reason}, and its cache {place} does not hold it{at}: "
                "give a folder, or fetch it first"
            ) from None

    def names(self) -> list[str]:
        """Names of its files.

        Raises:
            UsageError: the hub has no such repository or revision, or does not let this user read it.
        """
        errors = self.client.errors
        try:
            info = self.client.HfApi().model_info(self.name, revision=self.revision)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            at = f"@{self.revision}" if self.revision else ""
            raise UsageError(f"{self.name}{at} is no path here, and the hub does not give it: {_line(error)}") from None
        return [file.rfilename for file in info.siblings or ()]

    def fetched(self, names: Sequence[str], choose: Choice) -> Path:
        """Its folder in the cache, once all that is needed is there."""
        if MANIFEST_FILE in names:
            folder = self._fetch([MANIFEST_FILE])
            manifest = folder / MANIFEST_FILE
            return self._fetch(parse_manifest(read_json(manifest), str(manifest)).files)
        needed = choose(names, self.name)
        folder = self._fetch(needed)
        indexes = [folder / name for name in needed if ".index." in name]
        shards = {f"{index.parent.name}/{shard}" for index in indexes for shard in shards_of(index).values()}
        return self._fetch(sorted(shards)) if shards else folder

    def _fetch(self, names: Iterable[str]) -> Path:
        patterns = [glob.escape(name) for name in names]
        try:
            return Path(self.client.snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))
        except Exception as error:  # as above
            raise UsageError(f"fetching {self.name} stopped: {_line(error)}; run again, it goes on") from error


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
