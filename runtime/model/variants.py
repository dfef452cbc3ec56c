"""Which of a component's files hold its weights: the plain ones, or those of a variant.

Diffusers writes a variant into the names: `STEM.fp16.safetensors`, and for shards `STEM.safetensors.index.fp16.json`;
some repositories have `STEM.fp16.safetensors.index.json`. Folders lie on disks with or without the plain files.
"""

import re
from collections.abc import Iterable

from ..errors import UsageError
from ..files import is_left_behind

__all__ = ["STEMS", "choose_weights", "require_variant", "variants_of"]

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "tiny_decoder": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""How each component's weights are called, without suffix."""

PLAIN = ""
"""The variant of files that name none."""

_VARIANT = "[A-Za-z0-9_-]+"


def variants_of(names: Iterable[str], stem: str) -> dict[str, str]:
    """The file of each variant that is there: its weights, or the index that names their shards."""
    whole = re.compile(rf"{re.escape(stem)}(?:\.({_VARIANT}))?\.safetensors")
    index = re.compile(rf"{re.escape(stem)}(?:\.({_VARIANT}))?\.safetensors\.index(?:\.({_VARIANT}))?\.json")
    shard = re.compile(r"-\d{5}-of-\d{5}$")
    ordered, found = sorted(names), dict[str, str]()
    for pattern in (index, whole):  # one file before shards, where both are there
        for name in ordered:
            match = pattern.fullmatch(name)
            if match and not is_left_behind(name):
                variant = next((group for group in match.groups() if group), PLAIN)
                if not shard.search(variant):
                    found[variant] = name
    return found


def choose_weights(names: Iterable[str], stem: str, variant: str | None, where: object) -> str | None:
    """The file of a component's weights; None where there are none.

    Args:
        names: of the files in the component's folder.
        stem: how its weights are called, without suffix.
        variant: the one that is asked for; a component that has it not is taken in its plain form. None: the plain
            form, or the only one there.
        where: the folder, for errors.

    Raises:
        UsageError: what is asked for is not there, or there are several variants and nothing says which.
    """
    found = variants_of(names, stem)
    if not found:
        return None
    for wanted in (PLAIN if variant is None else variant, PLAIN):
        if wanted in found:
            return found[wanted]
    if variant is not None:
        raise UsageError(f"{where} has no weights of variant '{variant}': found {', '.join(found)}")
    if len(found) > 1:
        raise UsageError(f"{where} holds weights of several variants, {', '.join(found)}: choose one with --variant")
    return next(iter(found.values()))


def require_variant(names: Iterable[str], variant: str, where: object) -> None:
    """Refuse a variant that no component of a checkpoint has.

    Args:
        names: of its files, each with its folder: `vae/config.json`.
        variant: the one that is asked for.
        where: the checkpoint, for errors.

    Raises:
        UsageError: none has it.
    """
    files = [name.split("/") for name in names]
    found: set[str] = set()
    for component, stem in STEMS.items():
        found |= variants_of((path[1] for path in files if path[0] == component and len(path) == 2), stem).keys()
    if variant not in found:
        others = ", ".join(sorted(found - {PLAIN})) or "none"
        raise UsageError(f"{where} has no weights of variant '{variant}': found variants {others}; leave out --variant")
