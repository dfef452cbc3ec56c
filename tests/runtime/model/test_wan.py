"""Wan as data against diffusers' own modules: its tensors, and what its decoder keeps from frame to frame."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from pyrexport.runtime.chain.kinds import KINDS
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.families import find_family
from pyrexport.runtime.model.families.wan import WAN, WAN_TI2V, WanConfig
from pyrexport.runtime.model.families.wan_decoder import WanDecoderConfig

Shapes = dict[str, tuple[int, ...]]


def shapes_of(**config: Any) -> Shapes:
    """Name and shape of every tensor of diffusers' transformer."""
    with torch.device("meta"):
        module = WanTransformer3DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("heads", [2, 12])
@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_the_transformers_tensors_are_those_of_diffusers(heads: int, cross_attn_norm: bool) -> None:
    config = WanConfig(
        num_attention_heads=heads, ffn_dim=96, num_layers=2, text_dim=24, cross_attn_norm=cross_attn_norm
    )
    plain = shapes_of(**vars(config))
    assert WAN.transformer_tensors(config, KINDS["plain"], [config.patch_size]) == plain
    pyramidal = WAN.transformer_tensors(config, KINDS["pyramidal"], [config.patch_size] * 3)
    assert pyramidal == plain | {"first_frame_embedding": (config.width,)}


def test_ppf_has_diffusers_patch_layers_of_each_patch_size() -> None:
    config, patches = WanConfig(num_attention_heads=2, ffn_dim=96, num_layers=1, text_dim=24), [(1, 2, 2), (2, 4, 4)]
    expected: Shapes = {}
    for index, patch in enumerate(patches):
        for name, shape in shapes_of(**vars(config) | {"patch_size": patch}).items():
            layer, _, leaf = name.partition(".")
            expected[f"{layer}.{index}.{leaf}" if layer in ("patch_embedding", "proj_out") else name] = shape
    assert WAN.transformer_tensors(config, KINDS["ppf"], patches) == expected


def caches_of(vae: AutoencoderKLWan, frames: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Shapes [frames, C, h, w] of the caches that diffusers' decoder has after a number of latent frames."""
    latent = torch.zeros(1, vae.config.z_dim, frames, height, width)
    vae.clear_cache()
    for index in range(frames):
        frame = latent[:, :, index : index + 1]
        vae.decoder(vae.post_quant_conv(frame), feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0)
    # diffusers counts convolutions of one tap too, which keep nothing.
    kept = [cache for cache in vae._feat_map if cache is not None]
    return [tuple(cache[0].transpose(0, 1).shape) for cache in kept]


DECODERS: dict[str, dict[str, Any]] = {
    "default widths": {},
    "as a tiny checkpoint": {"num_res_blocks": 1},
    "a width of its own": {"decoder_base_dim": 12},
    "other widths": {"dim_mult": [1, 3, 2, 4], "num_res_blocks": 3, "temperal_downsample": [True, False, True]},
}
RESIDUAL: dict[str, Any] = {
    "z_dim": 12,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "decoder_base_dim": 12,
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 12,
    "latents_std": [1.0] * 12,
}
OTHERS: dict[str, dict[str, Any]] = {
    "residual": RESIDUAL,
    "two scales": {"dim_mult": [1, 3], "num_res_blocks": 1, "temperal_downsample": [True], "z_dim": 4},
    "no scale in time": {"dim_mult": [2, 1, 2], "temperal_downsample": [False, False]},
    "five scales": {
        "dim_mult": [1, 2, 2, 3, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True, False, False, True],
    },
}


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
@pytest.mark.parametrize("frames", [2, 3])
def test_caches_have_the_shapes_that_diffusers_own_have(name: str, frames: int) -> None:
    """They are the last two frames of every causal convolution of more than one tap, from the second frame on."""
    given = {"base_dim": 8} | (DECODERS | OTHERS)[name]
    torch.manual_seed(0)
    with torch.no_grad():
        vae = AutoencoderKLWan(**given).eval()
        found = caches_of(vae, frames, 3, 5)
    config = WanDecoderConfig(
        z_dim=vae.config.z_dim,
        base_dim=vae.config.decoder_base_dim or vae.config.base_dim,
        dim_mult=tuple(vae.config.dim_mult),
        num_res_blocks=vae.config.num_res_blocks,
        temperal_downsample=tuple(vae.config.temperal_downsample),
        is_residual=vae.config.is_residual,
        patch_size=vae.config.patch_size or 1,
    )
    assert config.cache_shapes(3, 5) == found
    assert all(shape[0] == 2 for shape in found)
    causal = [module for module in vae.decoder.modules() if isinstance(module, WanCausalConv3d)]
    taps = [conv for conv in causal if conv.kernel_size[0] > 1]
    assert len(taps) == len(found)
    assert sorted(conv.in_channels for conv in taps) == sorted(shape[1] for shape in found)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_read_from_diffusers_own_configuration(name: str) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**{"base_dim": 8} | DECODERS[name])
    config = WAN.read_decoder(dict(vae.config), WanConfig(), "vae")
    assert config.base_dim == DECODERS[name].get("decoder_base_dim", 8)
    assert config.z_dim == 16
    for field in ("dim_mult", "num_res_blocks", "temperal_downsample"):
        written = vae.config[field]
        assert getattr(config, field) == (tuple(written) if isinstance(written, list) else written)


def test_a_residual_decoder_is_that_of_wan22() -> None:
    config = WanConfig(in_channels=12, out_channels=12)
    decoder = WAN_TI2V.read_decoder(RESIDUAL, config, "vae/config.json")
    assert (decoder.is_residual, decoder.patch_size, decoder.base_dim) == (True, 2, 12)
    with pytest.raises(UsageError, match="expected a VAE of residual, 4x16x16, found one of 4x8x8"):
        WAN_TI2V.read_decoder({"z_dim": 12}, config, "vae/config.json")


def test_the_family_is_told_by_the_vae_and_without_one_by_the_channels() -> None:
    document = WanConfig(in_channels=12, out_channels=12).to_json()
    assert find_family(document, RESIDUAL, "here") is WAN_TI2V
    assert find_family(document, {}, "here") is find_family(document, None, "here") is WAN
    assert find_family(document | {"in_channels": 48}, None, "here") is WAN_TI2V


@pytest.mark.parametrize("name", OTHERS)
def test_a_decoder_of_another_compression_than_4x8x8_is_refused(name: str) -> None:
    channels = OTHERS[name].get("z_dim", 16)
    config = WanConfig(in_channels=channels, out_channels=channels)
    with pytest.raises(UsageError, match="4x8x8"):
        WAN.read_decoder(OTHERS[name], config, "vae/config.json")
