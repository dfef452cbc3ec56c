"""Models of the hub as arguments: a bundle, or of a checkpoint's repository what is needed of it."""

from collections.abc import Sequence
from pathlib import Path

import click

from ..runtime.bundle import hub
from ..runtime.bundle.manifest import MANIFEST_FILE
from ..runtime.errors import UsageError
from ..runtime.model.variants import STEMS, choose_weights, require_variant

__all__ = ["find_model", "needed_files"]

_ROOT = ("model_index.json", "pyramid.json")
_FOLDERS = (*STEMS, "scheduler", "tokenizer")


def find_model(model: Path, variant: str | None = None, *, quiet: bool = False) -> Path:
    """See `hub.find_model`; of a checkpoint, the weights of one variant.

    Raises:
        UsageError: it has the form of a name of the hub, is no path here, and the hub or its cache does not have it.
    """

    def choose(names: Sequence[str], where: str) -> list[str]:
        return needed_files(names, variant, where)

    def warn(line: str) -> None:
        click.echo(f"Warning: {line}", err=True)

    return hub.find_model(model, choose, warn=warn, quiet=quiet)


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
