"""Tensor names: from Wan's original ones, and those of repackaged single files, to diffusers' and transformers'."""

import re
from collections.abc import Callable, Mapping

__all__ = ["PREFIXES", "prefix_of", "to_diffusers"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What repackaged files put before the names of a transformer's tensors."""

ORIGINAL = re.compile(r"(^|\.)(self_attn|cross_attn|(time|text)_embedding\.\d|time_projection|ffn\.\d|head\.head)\.")
"""What only Wan's original names of a transformer's tensors have."""

TEXT_ENCODER = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
"""Wan's names of UMT5's tensors as patterns, and transformers' in their place."""

RESIDUAL_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
"""A tensor in a level of Wan2.2's VAE: the half, the direction, the level, the layer, and the tensor in it."""

RESIDUAL_LAYERS = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)

SLOW_TOKENIZER = "spiece_model"
"""A tensor of repackaged text encoders that holds no weight."""


def to_diffusers(component: str, names: list[str]) -> Mapping[str, str]:
    """Diffusers' (and transformers') name of each name of a component's tensors, where it has another."""
    return _CONVERSIONS[component](names)


def prefix_of(names: list[str]) -> str:
    """What stands before all names of a transformer's tensors, of `PREFIXES`; "" where nothing does."""
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), "")


def _transformer(names: list[str]) -> dict[str, str]:
    prefix = prefix_of(names)
    bare = {name: name.removeprefix(prefix) for name in names}
    if not any(ORIGINAL.search(name) for name in bare.values()):
        return bare
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return _converted(convert_wan_transformer_to_diffusers, bare)


def _vae(names: list[str]) -> dict[str, str]:
    if "decoder.middle.0.residual.0.gamma" not in names:
        return {name: name for name in names}
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    bare = {name: name for name in names}
    levels = {name: _residual_level(name) for name in names if RESIDUAL_LEVEL.match(name)}
    return _converted(convert_wan_vae_to_diffusers, {n: n for n in bare if n not in levels}) | levels


def _residual_level(name: str) -> str:
    """Of a tensor in a level of Wan2.2's residual VAE, whose names diffusers' conversion does not know."""
    match = RESIDUAL_LEVEL.match(name)
    assert match is not None
    half, direction, level, index, rest = match.groups()
    block = f"{half}.{direction}_blocks.{level}"
    if rest.startswith(("resample.", "time_conv.")):
        return f"{block}.{direction}sampler.{rest}"
    for theirs, ours in RESIDUAL_LAYERS:
        rest = rest.replace(theirs, ours)
    return f"{block}.resnets.{index}.{rest}"


def _text_encoder(names: list[str]) -> dict[str, str]:
    found = {name: name for name in names if name != SLOW_TOKENIZER}
    if "token_embedding.weight" not in found:
        return found
    for pattern, ours in TEXT_ENCODER:
        found = {name: re.sub(pattern, ours, new) for name, new in found.items()}
    return found


def _converted(convert: Callable[[dict[str, str]], Mapping[str, str]], bare: Mapping[str, str]) -> dict[str, str]:
    """By a conversion of diffusers, which moves values from name to name; one at a time, so that none is lost."""
    return {name: next(iter(convert({new: name}))) for name, new in bare.items()}


_CONVERSIONS: Mapping[str, Callable[[list[str]], Mapping[str, str]]] = {
    "transformer": _transformer,
    "transformer_2": _transformer,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "tiny_decoder": lambda names: {name: name for name in names},
}
