"""A bundle as a pipeline: prompts to embeddings, noise to latents, latents to frames, one engine open at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.engines import MAX_THREADS, Engine, EngineOptions, Target, find_target
from ..bundle.graphs import LATENT, Decoder, GraphKey, stage_key
from ..bundle.hub import find_bundle
from ..bundle.opening import Bundle, open_bundle
from ..chain.plan import StepPlan, plan
from ..chain.pyramid import Resolution
from ..chain.sampler import Conditions, Step, sample_chunks
from ..chain.schedules import Schedule
from ..documents import Fields
from ..errors import UsageError
from ..model.description import Model
from .chunks import chunk_count, collect, decode_chunks, split, timed
from .decoder import decode, decode_tile
from .encoder import TextEncoder
from .features import timestep_features
from .graphs import OpenGraphs
from .preview import previewer, showing
from .prompts import PromptCache, encoder_hash
from .text import check_cleaning, prompt_warnings
from .timings import Timings

__all__ = ["Pipeline", "Sample", "load"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """What a call returns."""

    latents: Array
    """[C, T, H, W], normalised as the transformer sees them."""
    frames: NDArray[np.uint8] | None
    """[T, H, W, 3], or None for `output_type="latent"`."""
    timings: Timings
    warnings: tuple[str, ...]
    """What the user should know of the prompts, a line each: see `Pipeline.warnings`."""


class Pipeline:
    """An open bundle. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        *,
        options: EngineOptions | None = None,
        resident: bool = False,
        cache: PromptCache | None = None,
    ) -> None:
        """Take an open bundle; engines are opened when first needed, and kept all open if `resident`."""
        self.bundle, self.target = bundle, target
        self.graphs = OpenGraphs(bundle, target, options or EngineOptions(), resident=resident)
        self.encoder = TextEncoder(self.graphs, cache)

    @classmethod
    def from_pretrained(cls, bundle: str | Path, **options: Any) -> "Pipeline":
        """`load`, under the name that users of diffusers and optimum look for."""
        return load(bundle, **options)

    @property
    def model(self) -> Model:
        """The model: its pyramid, schedules and negative prompt."""
        return self.bundle.manifest.model

    @property
    def timings(self) -> Timings:
        """Where the time of the call that began last went."""
        return self.graphs.timings

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all engines."""
        self.graphs.close()

    def open(self, key: GraphKey) -> Engine:
        """The engine of a graph, opened if it is not."""
        return self.graphs.open(key)

    def run(self, key: GraphKey, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate a graph of the bundle."""
        return self.graphs.run(key, inputs)

    def encode(self, prompt: str) -> Array:
        """See `TextEncoder.encode`."""
        return self.encoder.encode(prompt)

    def warnings(self, schedule: Schedule, prompt: str | None, negative: str | Array | None = None) -> tuple[str, ...]:
        """What the user should know of a prompt and of a negative one, or its embeddings: see `prompt_warnings`."""
        own = self.model.negative_prompt
        return prompt_warnings(self.encoder.tokens, prompt, negative, own, guided=schedule.guided)

    def stage_inputs(self, step: StepPlan, latent: Array, conditions: Conditions) -> dict[str, NDArray[Any]]:
        """What the graph of a step's stage is given."""
        features = timestep_features(step.timestep, self.bundle.manifest.timestep_frequencies)
        given = {name: value[None] for name, value in conditions.items()}
        return {LATENT: latent[None], "timestep_features": features, **given}

    def velocity(self, step: StepPlan, latent: Array, conditions: Conditions) -> Array:
        """See `chain.sampler.Denoiser`."""
        outputs = self.run(stage_key(step.stage.index, step.expert), self.stage_inputs(step, latent, conditions))
        return np.asarray(outputs["velocity"][0])

    def decode(self, latent: Array) -> Iterator[Array]:
        """See `decoder.decode`; by the decoder that the bundle was opened with, the chunks of a latent one by one."""
        chunks = split(latent, self.model, self.bundle.manifest.resolution)
        return self.decode_chunks(chunks, len(chunks))

    def decode_chunks(self, chunks: Iterable[Array], count: int) -> Iterator[Array]:
        """See `chunks.decode_chunks`."""
        resolution, used = self.bundle.manifest.resolution, self.bundle.manifest.decoder
        return decode_chunks(chunks, count, self.model, resolution, lambda chunk: decode(self.graphs, chunk, used))

    def decode_tile(self, latent: Array, decoder: Decoder) -> Iterator[Array]:
        """See `decoder.decode_tile`."""
        return decode_tile(self.graphs, latent, decoder)

    def __call__(
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        schedule: str | Schedule | None = None,
        levels: list[list[float]] | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        seed: int = 0,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        latents: Array | None = None,
        chunks: int | None = None,
        frames: int | None = None,
        output_type: str = "np",
        callback: Callable[[Step], None] | None = None,
        preview: Callable[[NDArray[np.uint8]], None] | None = None,
        preview_decoder: str | None = None,
        on_frames: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> Sample:
        """Sample a video; a UsageError says which arguments don't fit the bundle.

        Args:
            prompt, prompt_embeds: what to show, in words or as [text length, text width], float32.
            negative_prompt, negative_prompt_embeds: what not to, in place of the model's own; for guided schedules.
            schedule, levels: a schedule, its name, steps such as "10-10-10", or natural levels, coarsest stage first.
            solver, guidance_scale: in place of the schedule's own; the second scale is of the second of two networks.
            seed, latents: of all noise; an initial latent at the coarsest stage's shape, of the first chunk.
            chunks, frames: how long the video is, of a model that makes it in chunks; see `chunks.chunk_count`.
            output_type, on_frames: "np" for frames, "latent" for none; given away [n, H, W, 3], uint8, as they come.
            callback, preview: called after each step; a preview gets small frames [T, h, w, 3], uint8.
            preview_decoder: "tiny" or "full": previews are the first frame [1, H, W, 3], after a stage's last step.
        """
        start, self.graphs.timings = _started(output_type), Timings()
        chosen = self.model.schedule(schedule, guidance_scale, guidance_scale_2, levels=levels, solver=solver)
        given = prompt, prompt_embeds, negative_prompt, negative_prompt_embeds
        texts = self.encoder.both(*given, guided=chosen.guided)
        made, count = list[Array](), chunk_count(self.model, self.bundle.manifest.resolution, chunks, frames)
        sampled = self.chunks(chosen, count, texts, seed, callback, preview, preview_decoder, latents=latents)
        shown = collect(sampled, made, partial(self.decode_chunks, count=count), output_type == "np", on_frames)
        self.timings.total = time.perf_counter() - start
        warned = self.warnings(chosen, prompt, _given(negative_prompt_embeds, negative_prompt))
        return Sample(np.concatenate(made, axis=1), shown, self.timings, (*warned, *self.encoder.cache_warnings))

    def chunks(
        self,
        schedule: Schedule,
        count: int,
        conditions: tuple[Conditions, Conditions | None],
        seed: int,
        callback: Callable[[Step], None] | None = None,
        preview: Callable[[NDArray[np.uint8]], None] | None = None,
        preview_decoder: str | None = None,
        *,
        latents: Array | None = None,
        past: Array | None = None,
    ) -> Iterator[Array]:
        """The latents of `count` chunks as they are made; conditions are the prompt's and the negative one's."""
        pyramid, (text, negative) = self.model.pyramid, conditions
        steps = plan(pyramid, self.bundle.manifest.resolution, schedule, count)
        shown = showing(preview, lambda: previewer(self.graphs, preview_decoder), callback)
        how: dict[str, Any] = {"negative": negative, "seed": seed, "latents": latents, "callback": shown}
        how |= {"history": self.model.family.history, "past": past}
        return timed(sample_chunks(steps, pyramid.taps, self, text, **how), self.graphs.timings)


def _given(*values: Any) -> Any:
    """The first that is one."""
    return next((value for value in values if value is not None), None)


def _started(output_type: str) -> float:
    """The time, once the type of output is known to be one."""
    if output_type not in ("np", "latent"):
        raise UsageError(f"output_type is 'np' or 'latent', found {output_type!r}")
    return time.perf_counter()


def load(
    bundle: str | Path,
    *,
    resolution: str | Resolution | None = None,
    decoder: str | None = None,
    resident: bool = False,
    threads: int = 0,
    verify: bool = False,
    cache_prompts: bool = False,
    **target_options: Any,
) -> Pipeline:
    """Open a bundle as a pipeline.

        >>> pipeline = pyrexport.load("wan.pyrx")  # doctest: +SKIP
        >>> video = pipeline("a cat", seed=0).frames  # doctest: +SKIP

    Args:
        bundle: its folder, or ORGANISATION/NAME[@REVISION] of the hub where there is no such path (extra `[hub]`): from
            the hub's cache, or fetched into it.
        resolution: one of the bundle's, such as "81x832x448"; None: its first. Pipelines of one bundle share its
            mapped weights.
        decoder: "full" or "tiny", what decodes frames, where it has both; None: its VAE's decoder.
        resident: keep all engines open, in place of one at a time.
        threads: threads of one operator; 0: as many as there are cores that the process may use.
        verify: hash every file again.
        cache_prompts: keep embeddings of prompts in the user's cache folder, and take them from there.
        target_options: the options of the bundle's target, such as `prepack=True`: see `Target.engine_options`.

    Raises:
        UsageError: it is not a bundle, the hub does not have it, it has no such resolution or decoder, its engine is
            not installed or too old, or does not have such an option, or its prompts were cleaned by another major
            version of ftfy than the installed one.
        CheckFailed: a file is missing, extra or damaged.
    """
    if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is a whole number from 0 to {MAX_THREADS}, found {threads!r}")
    size = Resolution.parse(resolution) if isinstance(resolution, str) else resolution
    opened = open_bundle(find_bundle(bundle), resolution=size, decoder=decoder, verify=verify)
    target, options = find_target(opened.manifest.target), EngineOptions(threads, target_options)
    _check(opened, target)
    target.check_engine_options(options)
    cache = PromptCache(encoder_hash(opened.manifest)) if cache_prompts else None
    return Pipeline(opened, target, options=options, resident=resident, cache=cache)


def _check(opened: Bundle, target: Target) -> None:
    """Refuse a bundle of another engine, other cleaning of prompts, or facts that are none of its target's."""
    manifest = opened.manifest
    try:
        target.check_version(manifest.engine, manifest.engine_version)
        if manifest.text is not None:
            check_cleaning(manifest.text.ftfy)
    except UsageError as error:
        raise UsageError(f"{opened.folder} was {error}") from error
    for name, entry in manifest.entries.items():
        target.check_facts(Fields(entry.facts, f"{opened.folder}: graph '{name}': facts"))
