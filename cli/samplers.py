"""What samples and decodes: a bundle's pipeline, or a checkpoint's PyTorch reference."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle.engines import EngineOptions
from ..runtime.bundle.manifest import digest
from ..runtime.bundle.opening import is_bundle
from ..runtime.chain.plan import plan
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.sampler import Step
from ..runtime.chain.schedules import Schedule
from ..runtime.errors import UsageError
from ..runtime.files import file_digest
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.description import Model
from ..runtime.model.identity import checkpoint_digest, checkpoint_files
from ..runtime.model.preview import Preview, PreviewMap
from ..runtime.pipeline.chunks import split
from ..runtime.pipeline.decoder import frames_from, require_finite
from ..runtime.pipeline.latents import checkpoint_of
from ..runtime.pipeline.pipeline import Pipeline, load
from ..runtime.pipeline.preview import decoded_preview, mapped_preview, preview_map, showing
from ..runtime.pipeline.text import Tokenizer, prompt_warnings
from ..runtime.quantisation import DECODERS
from .reading import Reading, resolve_checkpoint

__all__ = ["BundleSampler", "Request", "Sampler", "open_sampler"]

Frames = NDArray[np.uint8]
Latents = NDArray[np.float32]
Callback = Callable[[Step], None]
Show = Callable[[Preview], None]

_NOT_SAMPLED = ("provenance", "parity", "graph_parity")
"""Fields of a manifest that nothing which is sampled depends on."""


@dataclass(frozen=True)
class Request:
    """How prompts are to be sampled."""

    schedule: Schedule
    negative: str
    seed: int
    chunks: int
    """Of a model that makes videos whole: 1."""


class Sampler(Protocol):
    """A model that can be sampled."""

    model: Model
    resolution: Resolution
    has_text_encoder: bool
    has_decoder: bool
    frame_rate: int
    """Frames a second."""
    preview: PreviewMap | None
    """The map of previews."""
    preview_decoder: str | None
    """What decodes previews in place of the map: a name of `DECODERS`."""
    gpus: int
    """How many it takes: what a cluster shares out."""
    preview_seconds: float
    """What decoding the previews of the last sample took."""

    @property
    def identity(self) -> str:
        """A hash of all that a model's samples depend on: its weights, and what is said of them."""
        ...

    @property
    def checkpoint_hash(self) -> str | None:
        """A hash of the files that a bundle was built from, or of a checkpoint's."""
        ...

    def warnings(self, schedule: Schedule, prompt: str, negative: str | None) -> tuple[str, ...]:
        """What the user should know of a prompt and of the negative one that is given: see `prompt_warnings`."""
        ...

    def latents(
        self, prompt: str, request: Request, callback: Callback, show: Show | None, past: Latents | None = None
    ) -> Iterator[Latents]:
        """Sample a prompt: the latent [C, T, H, W] of each chunk after those that are known, as it is made.

        A video that is made whole is one. `show` is given a preview after each step.
        """
        ...

    def decode(self, chunks: Iterable[Latents], count: int) -> Iterator[Frames]:
        """Frames [n, H, W, 3] of as many chunks, as they come."""
        ...


@contextmanager
def open_sampler(
    model: Path, reading: Reading, engine: EngineOptions, *, resident: bool, decoder: str | None, cache: bool
) -> Iterator[Sampler]:
    """The sampler of a bundle or of a checkpoint, which decodes by one of its decoders.

    A bundle's prompts may be kept in the user's cache folder.

    Raises:
        UsageError: an option is for the other one, or there is no such decoder.
    """
    if is_bundle(model):
        reading.weights.refuse_for_bundle(model)
        opening: dict[str, Any] = {"resolution": reading.resolution, "decoder": decoder, "threads": engine.threads}
        opening |= {"cache_prompts": cache, **engine.own}
        with load(model, resident=resident, **opening) as pipeline:
            yield BundleSampler(pipeline)
        return
    if engine.own or resident:
        given = [f"--{name.replace('_', '-')}" for name in engine.own] + (["--resident"] if resident else [])
        raise UsageError(f"{model} is a checkpoint, which PyTorch runs: leave out {', '.join(given)} (for bundles)")
    yield ReferenceSampler(resolve_checkpoint(model, reading.resolution, reading.weights), engine.threads, decoder)


class BundleSampler:
    """A bundle's pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        manifest = pipeline.bundle.manifest
        self.pipeline, self.model, self.resolution = pipeline, pipeline.model, manifest.resolution
        self.has_text_encoder, self.has_decoder = manifest.text is not None, manifest.decoder is not None
        self.identity = digest({name: value for name, value in manifest.to_json().items() if name not in _NOT_SAMPLED})
        self.checkpoint_hash, self.frame_rate = checkpoint_of(manifest), manifest.frame_rate
        self.preview, self.preview_seconds = manifest.preview, 0.0
        self.gpus = pipeline.target.gpus(pipeline.graphs.options)
        self.preview_decoder: str | None = None
        self._said: set[str] = set()
        self.warnings = pipeline.warnings

    def latents(
        self, prompt: str, request: Request, callback: Callback, show: Show | None, past: Latents | None = None
    ) -> Iterator[Latents]:
        pipeline, schedule = self.pipeline, request.schedule
        text = {"text": pipeline.encode(prompt)}
        negative = {"text": pipeline.encode(request.negative)} if schedule.guided else None
        for line in pipeline.encoder.cache_warnings:
            if line not in self._said:
                click.echo(f"Warning: {line}", err=True)
                self._said.add(line)
        before, how = pipeline.timings.preview, dict[str, Any](preview_decoder=self.preview_decoder, past=past)
        yield from pipeline.chunks(schedule, request.chunks, (text, negative), request.seed, callback, show, **how)
        self.preview_seconds = pipeline.timings.preview - before

    def decode(self, chunks: Iterable[Latents], count: int) -> Iterator[Frames]:
        return map(frames_from, self.pipeline.decode_chunks(chunks, count))


class ReferenceSampler:
    """A checkpoint's PyTorch reference, loaded when the first job is done."""

    def __init__(self, checkpoint: Checkpoint, threads: int, decoder: str | None) -> None:
        self.checkpoint, self.threads = checkpoint, threads
        self.decoder = None if decoder is None else DECODERS[decoder]
        if self.decoder is not None and self.decoder not in checkpoint.model.decoders:
            raise UsageError(
                f"{checkpoint.folder} has no {decoder} decoder: a tiny one is given with --vae-decoder FILE"
            )
        self.model, self.resolution = checkpoint.model, checkpoint.resolution
        self.has_text_encoder, self.has_decoder = bool(checkpoint.text_encoder), bool(checkpoint.model.decoders)
        self.frame_rate, self.preview = checkpoint.model.family.frame_rate, checkpoint.model.preview
        self.preview_decoder: str | None = None
        self.preview_seconds, self.gpus = 0.0, 0
        self._reference: Any = None
        self._tokenizer: Tokenizer | None = None

    @cached_property
    def checkpoint_hash(self) -> str:
        return checkpoint_digest(checkpoint_files(self.checkpoint))

    @cached_property
    def identity(self) -> str:
        model, checkpoint = self.model, self.checkpoint
        facts: dict[str, Any] = {"weights": self.checkpoint_hash, "model": model.to_json()}
        facts |= {"transformer": model.transformer.to_json(), "vae": checkpoint.vae_config}
        if checkpoint.text_encoder:
            facts["text_encoder"] = checkpoint.text_encoder_config
            facts["tokenizer"] = file_digest(checkpoint.tokenizer_file)
        return digest(facts)

    def warnings(self, schedule: Schedule, prompt: str, negative: str | None) -> tuple[str, ...]:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.checkpoint.tokenizer_file, self.model.text_length)
        return prompt_warnings(self._tokenizer, prompt, negative, self.model.negative_prompt, guided=schedule.guided)

    def latents(
        self, prompt: str, request: Request, callback: Callback, show: Show | None, past: Latents | None = None
    ) -> Iterator[Latents]:
        """All at once: the family's own pipeline goes on from no latents."""
        told, self.preview_seconds = showing(show, self._previewer, callback) or callback, 0.0
        schedule = request.schedule
        reference, steps = self._loaded(), plan(self.model.pyramid, self.resolution, schedule, request.chunks)
        text = reference.encode([prompt, request.negative] if schedule.guided else [prompt])
        latents: Latents = reference.sample(steps, text[0], text[-1], request.seed, told)
        require_finite(latents, "the latents of this run")
        known = 0 if past is None else past.shape[1]
        yield from split(latents[:, known:], self.model, self.resolution)

    def _previewer(self) -> Callable[[Step], Preview | None]:
        if self.preview_decoder is None:
            return mapped_preview(preview_map(self.preview, self.checkpoint.folder))
        component = DECODERS[self.preview_decoder]
        _, _, *finest = self.model.stages(self.resolution)[0].latent

        def decoded(latent: Latents) -> Iterator[Latents]:
            start = time.perf_counter()
            yield self._loaded().decode_float(latent, component)
            self.preview_seconds += time.perf_counter() - start

        return decoded_preview(decoded, (finest[0], finest[1]))

    def decode(self, chunks: Iterable[Latents], count: int) -> Iterator[Frames]:
        yield self._loaded().decode(np.concatenate(list(chunks), axis=1), self.decoder)

    def _loaded(self) -> Any:
        if self._reference is None:
            self._reference = self._load()
        return self._reference

    def _load(self) -> Any:
        import torch

        from ..export.reference.reference import Reference

        if self.threads:
            torch.set_num_threads(self.threads)
        return Reference(self.checkpoint)
