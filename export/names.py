"""Tensor names: from Wan's original ones to diffusers'."""

from collections.abc import Mapping

__all__ = ["is_original", "to_diffusers"]


def is_original(names: list[str]) -> bool:
    """Whether a transformer's tensors carry the names of Wan's own repository."""
    return any(".self_attn." in name for name in names)


def to_diffusers(names: list[str]) -> Mapping[str, str]:
    """From each name to diffusers' name, by diffusers' own conversion (which only renames)."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers({name: name for name in names})
    return {original: name for name, original in converted.items()}
