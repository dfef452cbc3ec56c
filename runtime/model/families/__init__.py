"""Families of models as data: a new one is a module here, its PyTorch half in `export.families`, and a line below."""

from collections.abc import Mapping
from typing import Any

from ...errors import UsageError
from .family import DecoderConfig, Family, Shapes, TransformerConfig
from .wan import WAN

__all__ = ["FAMILIES", "DecoderConfig", "Family", "Shapes", "TransformerConfig", "find_family"]

FAMILIES: Mapping[str, Family] = {family.transformer_class: family for family in (WAN,)}
"""Every family, by the class of its transformer."""


def find_family(document: Mapping[str, Any], source: str) -> Family:
    """The family of a transformer's `config.json`.

    Raises:
        UsageError: the configuration names no class, or one that no family has.
    """
    found = document.get("_class_name")
    if not isinstance(found, str) or found not in FAMILIES:
        wanted = " or ".join(FAMILIES)
        raise UsageError(f"{source}: expected the configuration of a {wanted}, found _class_name {found!r:.60}")
    return FAMILIES[found]
