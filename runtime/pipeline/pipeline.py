"""A bundle as a pipeline: prompts to embeddings, noise to latents, latents to frames, with one engine open at a time."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.engines import MAX_THREADS, Engine, EngineOptions, Target, find_target
from ..bundle.manifest import PACKED, TOKENIZER_FILE, WEIGHTS_FILE, TableEntry, cache_names
from ..bundle.opening import Bundle, open_bundle
from ..bundle.tiles import decode_tiled
from ..chain.pyramid import VAE_SPATIAL
from ..chain.sampler import Step, floats, sample
from ..errors import CheckFailed, UsageError
from .features import timestep_features
from .text import Tokenizer

__all__ = ["Pipeline", "Sample", "Timings", "frames_from", "load", "require_finite"]

Array = NDArray[np.float32]


@dataclass
class Timings:
    """Seconds spent, by what they were spent on."""

    load: float = 0.0
    """Opening engines."""
    engine: dict[str, float] = field(default_factory=dict)
    """Inside each graph."""
    denoise: float = 0.0
    """From the first to the last step of the chain, engines and opening included."""
    total: float = 0.0

    @property
    def glue(self) -> float:
        """Time of the chain that is neither inside an engine nor spent on opening one."""
        return max(0.0, self.denoise - self.chain_engines - self.chain_load)

    chain_engines: float = 0.0
    chain_load: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What a call returns."""

    latents: Array
    """[C, T, H, W], normalised as the transformer sees them."""
    frames: NDArray[np.uint8] | None
    """[T, H, W, 3], or None for `output_type="latent"`."""
    timings: Timings


def frames_from(video: Array) -> NDArray[np.uint8]:
    """Frames [n, 3, H, W] in -1 … 1 to [n, H, W, 3], rounded as diffusers' VideoProcessor does."""
    scaled = np.clip(video * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.asarray((scaled * np.float32(255)).round(), np.uint8).transpose(0, 2, 3, 1)


def require_finite(values: Array, what: str) -> None:
    """Refuse NaN and infinity, which would otherwise become black frames.

    Raises:
        CheckFailed: there are some.
    """
    if not np.isfinite(values).all():
        raise CheckFailed(f"{what} are not finite: the weights or the embeddings are damaged; run parity")


class Pipeline:
    """An open bundle. Use it as a context manager, or call `close`."""

    def __init__(
        self, bundle: Bundle, target: Target, *, options: EngineOptions | None = None, resident: bool = False
    ) -> None:
        """Take an open bundle; engines are opened when first needed, and kept all open if `resident`."""
        self.bundle, self.target, self.resident = bundle, target, resident
        self.options = options or EngineOptions()
        self.timings = Timings()
        self._engines: dict[str, Engine] = {}
        self._tokenizer: Tokenizer | None = None

    @property
    def model(self) -> Any:
        """The model's description: pyramid, schedules, negative prompt."""
        return self.bundle.manifest.model

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _close_others(self, file: str) -> None:
        """Close engines; of profiles, those of other files."""
        for graph in list(self._engines):
            if self.target.GROUPING != "profiles" or self.bundle.manifest.graphs[graph].file != file:
                self._engines.pop(graph).close()

    def run(self, graph: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate a graph of the bundle."""
        engine = self.open(graph)
        start = time.perf_counter()
        outputs = engine.run(inputs)
        self.timings.engine[graph] = self.timings.engine.get(graph, 0.0) + time.perf_counter() - start
        return outputs

    def open(self, graph: str) -> Engine:
        """The engine of a graph, opened if it is not; closes the others unless the pipeline is resident."""
        if graph not in self._engines:
            manifest = self.bundle.manifest
            if graph not in manifest.graphs:
                raise UsageError(f"{self.bundle.folder} has no graph '{graph}'")
            entry = manifest.graphs[graph]
            if not self.resident:
                self._close_others(entry.file)
            start = time.perf_counter()
            specs = {"inputs": entry.inputs, "outputs": entry.outputs, "facts": entry.facts}
            self._engines[graph] = self.target.open_engine(self.bundle.file(entry.file), graph, specs, self.options)
            self.timings.load += time.perf_counter() - start
        return self._engines[graph]

    def encode(self, prompt: str) -> Array:
        """Embeddings of a prompt [text length, text width], zero after its end.

        Raises:
            UsageError: the bundle has no text encoder.
        """
        embeddings, mask = self.embed(prompt)
        length = mask.shape[1]
        text = self.run(f"text_{length}", {"embeddings": embeddings, "mask": mask})["text"][0]
        out = np.zeros((self.model.text_length, text.shape[1]), np.float32)
        out[:length] = text
        return out

    def embed(self, prompt: str) -> tuple[Array, Array]:
        """What the text encoder is given: rows of its table [1, L, text width] and their mask [1, L], L the shortest length.

        Raises:
            UsageError: the bundle has no text encoder.
        """
        manifest = self.bundle.manifest
        if manifest.text is None:
            raise UsageError(f"{self.bundle.folder} has no text encoder: give prompt_embeds")
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.bundle.file(TOKENIZER_FILE), self.model.text_length)
        ids = self._tokenizer(prompt)
        length = next(n for n in manifest.text.lengths if n >= len(ids))
        mask = np.zeros((1, length), np.float32)
        mask[0, : len(ids)] = 1
        embeddings = np.zeros((1, length, manifest.text.table.width), np.float32)
        embeddings[0, : len(ids)] = _rows(self.bundle.file(WEIGHTS_FILE), manifest.text.table, ids)
        return embeddings, mask

    def velocity(self, stage: int, latent: Array, timestep: float, text: Array) -> Array:
        """See `sampler.Denoiser`."""
        features = timestep_features(timestep, self.bundle.manifest.timestep_frequencies)
        inputs = {"latent": latent[None], "timestep_features": features, "text": text[None]}
        velocity: Array = self.run(f"stage{stage}", inputs)["velocity"][0]
        return velocity

    def decode(self, latent: Array) -> Iterator[Array]:
        """Frames [n, 3, H, W] in -1 … 1: one frame, then four by four.

        A frame that is decoded in tiles comes when its last tile does.

        Raises:
            UsageError: the bundle has no VAE.
        """
        vae = self.bundle.manifest.vae
        if vae is None:
            raise UsageError(f"{self.bundle.folder} has no VAE: take latents")
        if vae.tiles.count == 1:
            return self.decode_tile(latent)
        return decode_tiled(vae.tiles, latent, self.decode_tile)

    def decode_tile(self, latent: Array) -> Iterator[Array]:
        """A latent [C, T, h, w] of a tile's size to frames [n, 3, 8h, 8w] in -1 … 1, one latent frame at a time."""
        manifest = self.bundle.manifest
        mean, std = (
            np.array(values, np.float32)[:, None, None] for values in (manifest.latents_mean, manifest.latents_std)
        )
        caches: dict[str, NDArray[Any]] = {}
        for index in range(latent.shape[1]):
            frame = {"latent": (latent[:, index] * std + mean)[None]}
            outputs = self.run("vae_next" if index else "vae_first", frame | caches)
            frames, caches = _decoded(outputs, [4 if index else 1, 3, *(VAE_SPATIAL * n for n in latent.shape[2:])])
            require_finite(frames, "the decoded frames")
            yield frames

    def __call__(
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        schedule: str | None = None,
        levels: list[list[float]] | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        latents: Array | None = None,
        output_type: str = "np",
        callback: Callable[[Step], None] | None = None,
        on_frames: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> Sample:
        """Sample a video.

        Args:
            prompt: what to show; or give `prompt_embeds`.
            negative_prompt: in place of the model's own; used by guided schedules.
            schedule: by name, or steps per stage such as "10-10-10".
            levels: explicit natural levels per stage, coarsest first.
            guidance_scale: in place of the schedule's own.
            seed: of all noise in the run.
            prompt_embeds: [text length, text width], float32.
            negative_prompt_embeds: likewise.
            latents: initial latent at the coarsest stage's shape.
            output_type: "np" for frames, "latent" for latents alone.
            callback: called after each step.
            on_frames: given frames [n, H, W, 3], uint8, as they are decoded; they are not kept then.

        Raises:
            UsageError: arguments that do not fit the bundle.
        """
        if output_type not in ("np", "latent"):
            raise UsageError(f"output_type is 'np' or 'latent', found {output_type!r}")
        start = time.perf_counter()
        self.timings = Timings()
        plan = self.model.schedule(schedule, levels=levels, guidance_scale=guidance_scale)
        text = self._embeds(prompt, prompt_embeds, "prompt")
        negative = None
        if plan.guided:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = self.model.negative_prompt
            negative = self._embeds(negative_prompt, negative_prompt_embeds, "negative_prompt")
        before_load, before_engines = self.timings.load, sum(self.timings.engine.values())
        denoise = time.perf_counter()
        x = sample(
            self.model.pyramid, self, text, plan, negative_text=negative, seed=seed, latents=latents, callback=callback
        )
        self.timings.denoise = time.perf_counter() - denoise
        self.timings.chain_load = self.timings.load - before_load
        self.timings.chain_engines = sum(self.timings.engine.values()) - before_engines
        require_finite(x, "the latents of this run")
        frames = None
        if output_type == "np":
            pieces = (frames_from(video) for video in self.decode(x))
            if on_frames is None:
                frames = np.concatenate(list(pieces))
            else:
                for piece in pieces:
                    on_frames(piece)
        self.timings.total = time.perf_counter() - start
        return Sample(x, frames, self.timings)

    def _embeds(self, prompt: str | None, embeds: Array | None, name: str) -> Array:
        if (prompt is None) == (embeds is None):
            raise UsageError(f"give either {name} or {name}_embeds")
        if embeds is None:
            if not isinstance(prompt, str):
                raise UsageError(f"{name} is one string, found {type(prompt).__name__}: call once for each video")
            return self.encode(prompt)
        shape = (self.model.text_length, self.bundle.manifest.config.text_dim)
        return floats(embeds, shape, f"{name}_embeds")


def _decoded(outputs: dict[str, NDArray[Any]], shape: list[int]) -> tuple[Array, dict[str, NDArray[Any]]]:
    """Frames of a shape, and the caches as the next frame takes them."""
    if PACKED in outputs:
        count = math.prod(shape)
        return outputs[PACKED][:count].reshape(shape), {"cache_0": outputs[PACKED][count:]}
    count = len(outputs) - 1
    return outputs["frames"], {
        old: outputs[new] for old, new in zip(cache_names(count), cache_names(count, new=True), strict=True)
    }


def _rows(file: Path, table: TableEntry, ids: list[int]) -> Array:
    """Rows of the embedding table, read from the mapped weights file."""
    if ids and max(ids) >= table.rows:
        raise UsageError(f"the tokenizer gives token {max(ids)}, the embedding table has {table.rows} rows")
    stored = np.dtype(np.float32 if table.dtype == "float32" else np.uint16)
    mapped = np.memmap(file, stored, "r", table.offset, (table.rows, table.width))
    rows = np.asarray(mapped[ids])
    if table.dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.view(np.float16).astype(np.float32) if table.dtype == "float16" else rows


def load(
    bundle: str | Path,
    *,
    resident: bool = False,
    threads: int = 0,
    prepack: bool = False,
    provider: str = "",
    verify: bool = False,
) -> Pipeline:
    """Open a bundle as a pipeline.

        >>> pipeline = pyrexport.load("wan.pyrx")  # doctest: +SKIP
        >>> video = pipeline("a cat", seed=0).frames  # doctest: +SKIP

    Args:
        bundle: its folder.
        resident: keep all engines open, in place of one at a time.
        threads: of one operator; 0: the engine's choice.
        prepack: let the engine copy weights into its own layout.
        provider: ONNX Runtime's execution provider, such as "CUDAExecutionProvider"; empty: the CPU's.
        verify: hash every file again.

    Raises:
        UsageError: it is not a bundle, its engine is not installed or too old, or there is no such provider.
        CheckFailed: a file is missing, extra or damaged.
    """
    if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is a whole number from 0 to {MAX_THREADS}, found {threads!r}")
    opened = open_bundle(Path(bundle), verify=verify)
    target = find_target(opened.manifest.target)
    try:
        target.check_version(opened.manifest.engine, opened.manifest.engine_version)
    except UsageError as error:
        raise UsageError(f"{opened.folder} was {error}") from error
    options = EngineOptions(threads, prepack, provider)
    target.check_options(options)
    return Pipeline(opened, target, options=options, resident=resident)
