"""Models of the hub: a model argument may be ORGANISATION/NAME[@REVISION] where there is no such path.

Files come from the hub's cache if it is offline (HF_HUB_OFFLINE=1) or cannot be reached, and are fetched into it if
not; of a repository only what is needed.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.manifest import MANIFEST_FILE, parse_manifest
from ..runtime.documents import read_json
from ..runtime.errors import UsageError
from ..runtime.model.safetensors import shards_of
from ..runtime.model.variants import STEMS, choose_weights, require_variant

__all__ = ["find_model", "needed_files"]

_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_ROOT = ("model_index.json", "pyramid.json")
_FOLDERS = (*STEMS, "scheduler", "tokenizer")


def find_model(model: Path, variant: str | None = None, *, quiet: bool = False) -> Path:
    """The path of a model: as it is given, or the folder of the hub's cache that holds the model of that ID.

    Raises:
        UsageError: it has the form of an ID, is no path here, and the hub or its cache does not have it.
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
        click.echo(f"Warning: {reason}: {model} is taken from its cache", err=True)
        return folder
    return repository.fetched(names, variant)


def needed_files(names: Sequence[str], variant: str | None, where: str) -> list[str]:
    """Files of a checkpoint's repository that are needed; of weights in shards, the index in their place.

    Raises:
        UsageError: it is no checkpoint, or its weights are of several variants.
    """
    if "model_index.json" not in names:
        raise UsageError(f"{where} holds neither {MANIFEST_FILE} (a bundle) nor model_index.json (a checkpoint)")
    if variant is not None:
        require_variant(names, variant, where)
    needed = [name for name in _ROOT if name in names]
    for folder in _FOLDERS:
        own = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        chosen = choose_weights(own, STEMS[folder], variant, f"{where}/{folder}") if folder in STEMS else None
        if folder == "tokenizer" and "tokenizer.json" not in own and "spiece.model" in own:
            chosen = "spiece.model"  # to be refused in words of its own
        documents = [name for name in own if name.endswith(".json") and ".index." not in name and "/" not in name]
        needed += [f"{folder}/{name}" for name in dict.fromkeys([*documents, *([chosen] if chosen else [])])]
    return needed


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

    def fetched(self, names: Sequence[str], variant: str | None) -> Path:
        """Its folder in the cache, once all that is needed is there."""
        if MANIFEST_FILE in names:
            folder = self._fetch([MANIFEST_FILE])
            manifest = folder / MANIFEST_FILE
            return self._fetch(parse_manifest(read_json(manifest), str(manifest)).files)
        needed = needed_files(names, variant, self.name)
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
