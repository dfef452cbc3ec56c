"""Families of models as data: a new one is a module here, its PyTorch half in `export.families`, and a line below."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError
from .family import DecoderConfig, Family, Shapes, TransformerConfig
from .helios import HELIOS
from .tiny_decoder import TinyDecoderConfig
from .wan import WAN, WAN_TI2V

__all__ = [
    "FAMILIES",
    "DecoderConfig",
    "Family",
    "Shapes",
    "TinyDecoderConfig",
    "TransformerConfig",
    "find_family",
]

FAMILIES: Sequence[Family] = (WAN, WAN_TI2V, HELIOS)
"""Every family."""


def find_family(document: Mapping[str, Any], decoder: Mapping[str, Any] | None, source: str) -> Family:
    """The family of a transformer's `config.json`, and of that of the VAE beside it, where there is one.

    Raises:
        UsageError: the configuration names no class, or one that no family has.
    """
    found = document.get("_class_name")
    for family in FAMILIES:
        if family.transformer_class == found and family.claims(document, decoder):
            return family
    wanted = " or ".join(dict.fromkeys(family.transformer_class for family in FAMILIES))
    raise UsageError(f"{source}: expected the configuration of a {wanted}, found _class_name {found!r:.60}")
