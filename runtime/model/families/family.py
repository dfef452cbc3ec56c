"""What a family of models states about itself, for all who only need its data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ...chain.history import History
from ...chain.kinds import Kind
from ...chain.pyramid import Geometry, Resolution, Stage

__all__ = ["DecoderConfig", "Family", "Patch", "Shapes", "TransformerConfig"]

Patch = tuple[int, int, int]

Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor, by its name."""


class TransformerConfig(Protocol):
    """A transformer's configuration, as far as others than its family read it."""

    @property
    def in_channels(self) -> int:
        """Channels that the transformer takes: the latent's, and those of its other conditions."""
        ...

    @property
    def patch_size(self) -> Patch:
        """Patch size of the embedding, where stages have none of their own."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of the prompt embeddings."""
        ...

    @property
    def freq_dim(self) -> int:
        """Number of timestep features."""
        ...

    @property
    def longest_axis(self) -> int:
        """Tokens along an axis at which the positions end."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that the family reads."""
        ...


class DecoderConfig(Protocol):
    """A decoder's configuration, as far as others than its family read it."""

    normalised: ClassVar[bool]
    """Whether it takes latents as the transformer leaves them, not at their own mean and deviation."""
    cut: ClassVar[bool]
    """Whether large frames are cut into tiles for it."""

    def cache_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """What the decoder keeps from frame to frame, for latents of a size, in order."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that the family reads."""
        ...


class Family(Protocol):
    """Models that have one architecture, whatever their size."""

    name: str
    transformer_class: str
    """Diffusers' class of the transformer, which tells the family of a `config.json`."""
    pipeline_class: str
    """Diffusers' class of the pipeline that samples it."""
    frame_rate: int
    """Frames a second of the videos that its models were trained on."""
    text_in_fp16: bool
    """Whether the activations of its text encoder stay within float16's range."""
    plain_resolution: Resolution
    """What its models are sampled at, where nothing else is said."""
    history: History | None
    """What a chunk is told of those before it, of models that make videos in chunks; None: they make them whole."""

    clocked: bool
    """Its networks are told the time of a stage's clock and no noise level; its models are pyramids with clocks."""
    unread: tuple[str, ...]
    """Folders that lie beside its components in its authors' checkpoints, and are no part of sampling."""

    @property
    def assumed(self) -> tuple[str, Mapping[str, Any]]:
        """What a transformer's configuration alone is taken for: in words, and as a `pyramid.json` without a size."""
        ...

    def claims(self, document: Mapping[str, Any], decoder: Mapping[str, Any] | None) -> bool:
        """Whether a transformer of its class is one of it.

        Args:
            document: the transformer's `config.json`.
            decoder: that of the VAE beside it, where there is one.
        """
        ...

    def described(self, folder: Path) -> dict[str, Any] | None:
        """What the `pyramid.json` of a folder without one would say, but for format and resolution.

        None: what that of a plain model would.

        Raises:
            UsageError: the folder's scheduler is none of the family's.
        """
        ...

    def geometry(self, config: Any) -> Geometry:
        """Channels and compression of the latents."""
        ...

    def read_transformer(self, document: Mapping[str, Any], source: str) -> TransformerConfig:
        """Read a diffusers `config.json`; a missing field has diffusers' default.

        Raises:
            UsageError: it is malformed, or of a variant that is not supported.
        """
        ...

    def read_decoder(self, document: Mapping[str, Any], config: Any, source: str) -> DecoderConfig:
        """Read the `config.json` of the VAE that belongs to a transformer.

        Raises:
            UsageError: it is malformed, of a variant that is not supported, or belongs to other latents.
        """
        ...

    def transformer_tensors(self, config: Any, kind: Kind, patch_sizes: Sequence[Patch]) -> Shapes:
        """Every tensor of a transformer, in diffusers' names; patch sizes are of stages with layers of their own."""
        ...

    def stage_inputs(self, config: Any, stage: Stage, text_length: int) -> Shapes:
        """Inputs of a stage's graph, in order.

        `latent` and the conditions come from the chain, `timestep_features` from the host.
        """
        ...

    def flops(self, config: Any, stage: Stage, text_length: int) -> int:
        """FLOPs of one forward of a stage: twice the multiply-adds of the matrix products."""
        ...
