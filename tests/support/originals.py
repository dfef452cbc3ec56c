"""Wan's own names of tensors: the inverse of diffusers' conversions, written from Wan's repository."""

import re

__all__ = ["original_residual_vae", "original_text", "original_transformer", "original_vae"]

TRANSFORMER = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0.", ".o."),
    (".to_", "."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
)
TEXT = (
    ("shared.weight", "token_embedding.weight"),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.", "blocks."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.1.layer_norm.", ".norm2."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
)
VAE = (
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
    (".norm_out.", ".head.0."),
    (".conv_out.", ".head.2."),
    ("post_quant_conv.", "conv2."),
    ("quant_conv.", "conv1."),
    (".conv_in.", ".conv1."),
    (".conv_shortcut.", ".shortcut."),
)
RESIDUAL = (
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
)


def replaced(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A name, each rule applied in turn."""
    for theirs, wan in rules:
        name = name.replace(theirs, wan)
    return name


def original_transformer(name: str) -> str:
    """Wan's name of a transformer's tensor."""
    if name == "scale_shift_table":
        return "head.modulation"
    return replaced(name, TRANSFORMER).replace("scale_shift_table", "modulation")


def original_text(name: str) -> str:
    """Wan's name of a text encoder's tensor."""
    return replaced(name, TEXT)


def original_residual_vae(name: str) -> str:
    """Wan's name of a tensor of Wan2.2's VAE."""
    if "_block" in name and ".resnets." in name:
        name = replaced(name.replace(".conv_shortcut.", ".shortcut."), RESIDUAL)
    name = replaced(name, VAE)
    for half, direction in (("encoder", "down"), ("decoder", "up")):
        level = f"{direction}samples"
        name = re.sub(rf"{half}\.{direction}_blocks\.(\d+)\.resnets\.(\d+)", rf"{half}.{level}.\1.{level}.\2", name)
        last = 2 if direction == "down" else 3
        name = re.sub(
            rf"{half}\.{direction}_blocks\.(\d+)\.{direction}sampler", rf"{half}.{level}.\1.{level}.{last}", name
        )
    return name


def original_vae(name: str) -> str:
    """Wan's name of a tensor of a VAE with two residual blocks a level, as Wan's own has."""
    if "_block" in name and (".resnets." in name or re.search(r"down_blocks\.\d+\.(norm|conv)", name)):
        name = replaced(name.replace(".conv_shortcut.", ".shortcut."), RESIDUAL)
    name = replaced(name, VAE)
    name = re.sub(r"encoder\.down_blocks\.", "encoder.downsamples.", name)
    levels = re.compile(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.")
    return levels.sub(lambda m: f"decoder.upsamples.{4 * int(m[1]) + int(m[2] or 3)}.", name)
