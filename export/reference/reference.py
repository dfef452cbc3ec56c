"""The PyTorch reference: the family's own modules in the engine's place of the runtime's chain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray

from ...runtime.chain.noise import generator, standard_normal
from ...runtime.chain.plan import StepPlan
from ...runtime.chain.sampler import Conditions, Step, sample
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.pipeline.chunks import decode_chunks, split
from ..families import DecoderModules, decoder_modules, modules_of

__all__ = ["Reference"]


class Reference:
    """A checkpoint in PyTorch, float32: a denoiser, a text encoder and a decoder, each loaded when it is first used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Check the components' tensors.

        Raises:
            UsageError: a tensor of the VAE or the text encoder is missing, extra or misshaped.
        """
        self.checkpoint, self.modules = checkpoint, modules_of(checkpoint.model.family)
        self.modules.check_components(checkpoint)
        self._stages: dict[int, Sequence[Any]] = {}
        self._decoders: dict[str, Any] = {}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> NDArray[np.float32]:
        """Prompt embeddings [prompts, text length, text width]."""
        return self.modules.encode(self.checkpoint, prompts)

    def embed(self, prompts: Mapping[int, str]) -> dict[int, NDArray[np.float32]]:
        """Embeddings [text length, text width] of some prompts of a list, by their positions in it.

        Without a text encoder each is noise that is drawn from its position.
        """
        if self.checkpoint.text_encoder:
            return dict(zip(prompts, self.encode(list(prompts.values())), strict=True))
        model = self.checkpoint.model
        shape = (model.text_length, model.transformer.text_dim)
        return {position: standard_normal(generator(position), shape) for position in prompts}

    def sample(
        self,
        steps: Sequence[StepPlan],
        text: NDArray[np.float32],
        negative: NDArray[np.float32],
        seed: int,
        keep: Callable[[Step], None],
    ) -> NDArray[np.float32]:
        """Run a plan: by the family's own pipeline where that takes these very steps, else by the runtime's chain.

        Args:
            steps: of the run.
            text: embeddings of the prompt [text length, text width].
            negative: those of the negative prompt, used where steps are guided.
            seed: of all noise in the run.
            keep: called after each step.

        Returns:
            The latent after the last step [C, T, H, W].
        """
        if self.modules.follows_pipeline(self.checkpoint, steps):
            experts = [self.stages_of(expert)[0] for expert in range(self.checkpoint.model.experts)]
            return self.modules.run_pipeline(self.checkpoint, experts, steps, seed, text, negative, keep)
        taps = self.checkpoint.model.pyramid.taps
        conditions, unconditional = {"text": text}, {"text": negative}
        return sample(
            steps,
            taps,
            self,
            conditions,
            negative=unconditional,
            seed=seed,
            callback=keep,
            history=self.checkpoint.model.family.history,
        )

    @property
    def stages(self) -> Sequence[Any]:
        """The modules of the stages, finest first: of a model of several networks, of the first."""
        return self.stages_of(0)

    def stages_of(self, expert: int) -> Sequence[Any]:
        """The modules of the stages of one of the networks, finest first."""
        if expert not in self._stages:
            self._stages[expert] = self.modules.load_transformer(self.checkpoint, expert)
        return self._stages[expert]

    def decoder(self, component: str | None = None) -> Any:
        """The module of a decoder: of the checkpoint's first one, unless another is named."""
        name = component or self._first_decoder
        if name not in self._decoders:
            self._decoders[name] = self._decoder_modules(name).load_decoder(self.checkpoint)
        return self._decoders[name]

    @torch.no_grad()
    def velocity(self, step: StepPlan, latent: NDArray[np.float32], conditions: Conditions) -> NDArray[np.float32]:
        """See `runtime.chain.sampler.Denoiser`."""
        velocity: torch.Tensor = self.stages_of(step.expert)[step.stage.index](
            _tensor(latent)[None],
            torch.tensor([step.timestep], dtype=torch.float32),
            **{name: _tensor(values)[None] for name, values in conditions.items()},
        )
        return velocity[0].numpy()

    def decode(self, latent: NDArray[np.float32], decoder: str | None = None) -> NDArray[np.uint8]:
        """Frames [T, H, W, 3] of a latent [C, T, H, W], by diffusers' post-processing; see `decoder`."""
        model, resolution = self.checkpoint.model, self.checkpoint.resolution
        chunks = split(latent, model, resolution)

        def decoded(chunk: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
            yield self.decode_float(chunk, decoder)

        pieces = decode_chunks(chunks, len(chunks), model, resolution, decoded)
        video = torch.from_numpy(np.concatenate(list(pieces))).transpose(0, 1)[None]
        scale = self.checkpoint.model.pyramid.geometry.spatial
        frames = VideoProcessor(vae_scale_factor=scale).postprocess_video(video, output_type="np")[0]
        return np.asarray((frames * 255).round(), np.uint8)

    @torch.no_grad()
    def decode_float(self, latent: NDArray[np.float32], decoder: str | None = None) -> NDArray[np.float32]:
        """Frames [T, 3, H, W] in -1 … 1 of a latent [C, T, H, W], of one chunk; see `decoder`."""
        name = decoder or self._first_decoder
        video = self._decoder_modules(name).decode(self.decoder(name), _tensor(latent))
        return np.ascontiguousarray(video.transpose(0, 1).numpy())

    @property
    def _first_decoder(self) -> str:
        return next(iter(self.checkpoint.model.decoders))

    def _decoder_modules(self, component: str) -> DecoderModules:
        return decoder_modules(self.checkpoint.model.family, component)


def _tensor(values: NDArray[np.float32]) -> torch.Tensor:
    """An array as a tensor over the same memory; a copy where that is read-only, as what Ray hands to a worker is."""
    return torch.from_numpy(np.require(values, requirements="W"))
