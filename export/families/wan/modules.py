"""The PyTorch modules of a checkpoint: diffusers' and transformers' own classes with the checkpoint's weights."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from ....runtime.errors import UsageError
from ....runtime.model.checkpoint import Checkpoint, check_tensors
from ....runtime.model.safetensors import TensorEntry
from ...weights.edits import read_rows, read_tensor

__all__ = [
    "StageTransformer",
    "check_components",
    "empty_modules",
    "filled",
    "load_encoder",
    "load_text_encoder",
    "load_tokenizer",
    "load_transformer",
    "load_vae",
    "read_values",
    "transformer_config",
]


DEFAULT_CHANNELS = 16
"""Latent channels whose mean and deviation diffusers knows without being told."""

TABLE_ROWS = 4096
"""Rows of an embedding table that are compared at once."""


class StageTransformer(nn.Module):
    """The transformer of one stage: diffusers' module, with what pyramidal and PPF models add to it.

    Takes a latent [1, C, T, H, W], a timestep [1] and text [1, L, D]; returns the velocity [1, C, T, H, W].
    """

    def __init__(self, transformer: WanTransformer3DModel, first_frame_embedding: torch.Tensor | None = None) -> None:
        """Wrap a `WanTransformer3DModel`; the embedding [width] is added to every token of the first frame."""
        super().__init__()
        self.transformer: Any = transformer
        self.first_frame_embedding = None
        if first_frame_embedding is not None:
            self.first_frame_embedding = nn.Parameter(first_frame_embedding, requires_grad=False)
            transformer.patch_embedding.register_forward_hook(self._add_first_frame)

    def _add_first_frame(self, module: nn.Module, inputs: Any, tokens: torch.Tensor) -> torch.Tensor:
        assert self.first_frame_embedding is not None
        offset = self.first_frame_embedding.view(1, -1, 1, 1, 1).to(tokens.dtype)
        return torch.cat([tokens[:, :, :1] + offset, tokens[:, :, 1:]], dim=2)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Velocity of a latent; PPF resizes it to a multiple of the patch size and back (supplement A3)."""
        size = latent.shape[2:]
        patch = self.transformer.config.patch_size
        padded = [-(-n // p) * p for n, p in zip(size, patch, strict=True)]
        if list(size) != padded:
            latent = nn.functional.interpolate(latent, padded, mode="trilinear", align_corners=False)
        velocity: torch.Tensor = self.transformer(latent, timestep, text, return_dict=False)[0]
        if list(size) != padded:
            velocity = nn.functional.interpolate(velocity, tuple(size), mode="trilinear", align_corners=False)
        return velocity


def load_transformer(checkpoint: Checkpoint, expert: int = 0) -> list[StageTransformer]:
    """One module per stage, finest first, in float32; all share their weights, those of one of the networks."""
    tensors = read_values((checkpoint.transformer, checkpoint.transformer_2)[expert])
    pyramid = checkpoint.model.pyramid
    if pyramid.kind.own_patch_layers:
        return [_ppf_stage(checkpoint, tensors, index) for index in range(pyramid.depth)]
    own = {name: tensor for name, tensor in tensors.items() if name != "first_frame_embedding"}
    transformer = _transformer(checkpoint, pyramid.patch_sizes[0], own)
    return [StageTransformer(transformer, tensors.get("first_frame_embedding"))] * pyramid.depth


def _ppf_stage(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], index: int) -> StageTransformer:
    own = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in ("patch_embedding", "proj_out"):
            stage, _, leaf = rest.partition(".")
            if int(stage) == index:
                own[f"{part}.{leaf}"] = tensor
        else:
            own[name] = tensor
    return StageTransformer(_transformer(checkpoint, checkpoint.model.pyramid.patch_sizes[index], own))


def _transformer(
    checkpoint: Checkpoint, patch_size: tuple[int, ...], tensors: Mapping[str, torch.Tensor]
) -> WanTransformer3DModel:
    with init_empty_weights(include_buffers=False):
        module = WanTransformer3DModel.from_config(transformer_config(checkpoint) | {"patch_size": patch_size})
    return filled(module, tensors)


def transformer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's `config.json`, as diffusers' class takes it."""
    text = (checkpoint.folders["transformer"] / "config.json").read_text("utf-8")
    return {k: v for k, v in json.loads(text).items() if not k.startswith("_")}


def load_vae(checkpoint: Checkpoint) -> AutoencoderKLWan:
    """The VAE in float32.

    Raises:
        UsageError: the checkpoint has none, or its tensors are not those of its configuration.
    """
    return _load(checkpoint, "vae")


def load_encoder(checkpoint: Checkpoint) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The VAE's encoder in float32, its decoder left out: a frame [3, H, W] to the mode of its latent [C, h, w]."""
    vae: Any = empty_modules(checkpoint)["vae"]
    vae.decoder = vae.post_quant_conv = None
    halves = ("encoder.", "quant_conv.")
    filled(vae, read_values({name: entry for name, entry in checkpoint.vae.items() if name.startswith(halves)}))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))

    @torch.no_grad()
    def encode(frame: NDArray[np.float32]) -> NDArray[np.float32]:
        latent = vae.encode(torch.from_numpy(frame)[None, :, None]).latent_dist.mode()[0, :, 0]
        normalised: NDArray[np.float32] = ((latent - mean) / std).numpy()
        return normalised

    return encode


def load_text_encoder(checkpoint: Checkpoint) -> UMT5EncoderModel:
    """The text encoder in float32.

    Raises:
        UsageError: the checkpoint has none, or its tensors are not those of its configuration.
    """
    return _load(checkpoint, "text_encoder")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers reads it."""
    folder = checkpoint.folders["tokenizer"]
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever transformers raises on files that it cannot read
        raise UsageError(f"{folder}: transformers cannot read this tokenizer: {error}") from error


def empty_modules(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The VAE and the text encoder on the meta device: their tensors' names and shapes."""
    makers: dict[str, tuple[Mapping[str, Any] | None, Callable[[dict[str, Any]], nn.Module]]] = {
        "vae": (checkpoint.vae_config, AutoencoderKLWan.from_config),
        "text_encoder": (
            checkpoint.text_encoder_config,
            lambda config: UMT5EncoderModel(UMT5Config.from_dict(config)),
        ),
    }
    modules = {}
    for name, (config, make) in makers.items():
        if config is not None:
            try:
                with init_empty_weights(include_buffers=False):
                    modules[name] = make({k: v for k, v in config.items() if not k.startswith("_")})
            except Exception as error:  # whatever a library raises on a configuration that it cannot build
                source = checkpoint.folders[name] / "config.json"
                raise UsageError(f"{source}: no {name} can be built from it: {error}") from error
    return modules


def check_components(checkpoint: Checkpoint) -> None:
    """Check the VAE's and the text encoder's tensors against the classes that will hold them.

    Raises:
        UsageError: a tensor is missing, extra or misshaped; the message names it.
    """
    for component, module in empty_modules(checkpoint).items():
        _check(checkpoint, component, module)
    _check_table(checkpoint)
    _check_statistics(checkpoint)


def _check_statistics(checkpoint: Checkpoint) -> None:
    """Refuse a VAE of other latents than Wan2.1's that does not say their mean and deviation."""
    config, channels = checkpoint.vae_config, checkpoint.model.pyramid.geometry.channels
    for name in ("latents_mean", "latents_std") if config is not None and channels != DEFAULT_CHANNELS else ():
        if config is not None and config.get(name) is None:
            source = checkpoint.folders["vae"] / "config.json"
            raise UsageError(f"{source}: field '{name}' is missing: expected {channels} numbers")


def _check_table(checkpoint: Checkpoint) -> None:
    """Refuse a text encoder whose embeddings are there twice, and differ: one of them would be dropped."""
    ours, theirs = (checkpoint.text_encoder.get(name) for name in ("shared.weight", "encoder.embed_tokens.weight"))
    if ours is None or theirs is None:
        return
    for start in range(0, ours.shape[0], TABLE_ROWS):
        count = min(TABLE_ROWS, ours.shape[0] - start)
        if not torch.equal(*(read_rows(entry, start, count).float() for entry in (ours, theirs))):
            raise UsageError(
                f"{theirs.file}: expected tensor '{theirs.name}' to be '{ours.name}' again, found other values "
                f"from row {start} on: leave out the one that is not used"
            )


def _load(checkpoint: Checkpoint, component: str) -> Any:
    module = empty_modules(checkpoint).get(component)
    if module is None:
        raise UsageError(
            f"{checkpoint.folder} has no {component}/ folder; add it, or give and take tensors in its place"
        )
    _check(checkpoint, component, module)
    return filled(module, read_values(checkpoint.components[component]))


def _check(checkpoint: Checkpoint, component: str, module: nn.Module) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tied = frozenset(getattr(module, "_tied_weights_keys", None) or ())
    what = f"a {type(module).__name__}"
    check_tensors(checkpoint.folders[component], checkpoint.components[component], expected, what, tied)


def filled(module: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A module with these values, for evaluation.

    Raises:
        UsageError: one of its tensors is missing.
    """
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left:
        raise UsageError(f"tensor '{left[0]}' is missing")
    return module.eval().requires_grad_(False)


def read_values(tensors: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors in float32; each file is read from its beginning to its end."""
    by_place = sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].offset))
    return {name: read_tensor(entry) for name, entry in by_place}
