"""Tensor names: from Wan's original ones to diffusers'."""

from collections.abc import Mapping

__all__ = ["to_diffusers"]


def to_diffusers(names: list[str]) -> Mapping[str, str]:
    """Diffusers' name of each name: itself, unless they are Wan's own, which diffusers' conversion renames."""
    if not any(".self_attn." in name for name in names):
        return {name: name for name in names}
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # The conversion moves values from name to name; here each value is the name that it had.
    converted = convert_wan_transformer_to_diffusers({name: name for name in names})
    return {original: name for name, original in converted.items()}
