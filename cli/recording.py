"""How `parity` and `quality` record a reference: which runs, and at which sizes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.opening import open_bundle
from ..runtime.bundle.tiles import parse_tile
from ..runtime.chain.plan import plan
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.schedules import parse_levels
from ..runtime.chain.solvers import SOLVERS
from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.pipeline.chunks import MOST_CHUNKS, chunk_count
from ..runtime.proof.trace import Trace
from ..runtime.quantisation import DECODERS
from .common import NO_GUIDANCE, PATH, decoder_option, guidance_options, progress, read_prompts
from .reading import Weights, require_same_loras, resolution_option, resolve_checkpoint, weights_options

__all__ = ["Recording", "recording_options"]

DEFAULT_PROMPTS = ("a red circle moving left", "Two cats box on a stage, in the style of an old film.")
DEFAULT_SEEDS = (0,)


def recording_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the runs that are recorded, by the names of `Recording`'s fields."""
    seed = click.IntRange(0, MAX_INTEGER)
    decorated = decoder_option(resolution_option(weights_options(command)))
    for option in (
        click.option(
            "--chunks",
            type=click.IntRange(1, MOST_CHUNKS),
            help="Of the recorded runs, of a model that makes videos in chunks: 2 unless another is given.",
        ),
        click.option("--negative-prompt"),
        click.option("--solver", type=click.Choice(list(SOLVERS)), help="In place of the schedule's own."),
        guidance_options,
        click.option("--levels", help="Explicit natural levels, in place of a schedule."),
        click.option("--schedule", help="Of the recorded runs, in place of the model's default."),
        click.option("--seed", "seeds", type=seed, multiple=True, default=DEFAULT_SEEDS, show_default=True),
        click.option("--prompts", "prompts_file", type=PATH, help="A file with a prompt a line."),
        click.option("--prompt", "prompts", multiple=True, help="May be given more than once."),
    ):
        decorated = option(decorated)
    return decorated


@dataclass(frozen=True)
class Recording:
    """What was asked of a recording on the command line."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    schedule: str | None = None
    levels: str | None = None
    guidance: Mapping[str, float | None] = field(default_factory=lambda: NO_GUIDANCE)
    solver: str | None = None
    negative_prompt: str | None = None
    weights: Weights = field(default_factory=Weights)
    resolution: Resolution | None = None
    vae_tile: str | None = None
    decode: bool = True
    decoder: str | None = None
    chunks: int | None = None

    @property
    def words(self) -> list[str]:
        """The prompts of the runs, of which there is one for each of these and each seed."""
        return read_prompts(self.prompts_file) if self.prompts_file else list(self.prompts or DEFAULT_PROMPTS)

    def elsewhere(self) -> "Recording":
        """The same, for processes that start in other folders."""
        return replace(self, prompts=tuple(self.words), prompts_file=None, weights=self.weights.absolute())

    def write(
        self,
        checkpoint: Path,
        trace: Path,
        bundle: Path | None,
        quiet: bool,
        *,
        only: Sequence[int] | None = None,
        parts: bool = True,
    ) -> None:
        """Record a checkpoint; beside a bundle, at its resolution and on a tile of its size.

        See `record_trace` for `only` and `parts`.
        """
        found, tile, decoder = self._resolved(checkpoint, bundle)
        levels = None if self.levels is None else parse_levels(self.levels)
        chosen = found.model.schedule(self.schedule, levels=levels, solver=self.solver, **self.guidance)
        words = self.words
        from ..export.reference.record import PROBES, record_trace

        asked = chunk_count(found.model, found.resolution, self.chunks, None)
        chunks = found.model.telling_chunks if self.chunks is None else asked
        run = len(plan(found.model.pyramid, found.resolution, chosen, chunks))
        runs = len(words) * len(self.seeds) if only is None else len(only)
        total = len(PROBES) * found.model.pyramid.depth * parts + runs * run
        with progress(quiet) as bar:
            task = bar.add_task("reference", total=total)
            record_trace(
                found,
                trace,
                prompts=words,
                seeds=self.seeds,
                schedule=chosen,
                negative_prompt=found.model.negative_prompt if self.negative_prompt is None else self.negative_prompt,
                decode=self.decode,
                decoder=decoder,
                vae_tile=tile,
                chunks=chunks,
                only=only,
                parts=parts,
                advance=lambda: bar.advance(task),
            )

    def size_for(self, traces: Sequence[Path]) -> Resolution | None:
        """The resolution that a bundle is to be compared at: what was asked for, or that of the first trace."""
        if self.resolution is not None or not traces:
            return self.resolution
        with suppress(UsageError):
            return Resolution.parse(str(Trace(traces[0]).model.get("resolution")))
        return None

    def _resolved(self, checkpoint: Path, bundle: Path | None) -> tuple[Checkpoint, tuple[int, int] | None, str | None]:
        """The checkpoint, with all that a bundle is compared by; the decoder's tile, and the component that decodes."""
        resolution, tile, decoder = self._decoding(bundle)
        found = resolve_checkpoint(checkpoint, resolution, self.weights)
        needed: Collection[str] = () if decoder is None else (decoder,)
        if bundle is not None:
            manifest = open_bundle(bundle).manifest
            require_same_loras(bundle, manifest.provenance, found)
            needed = manifest.decoders
        for name in needed:
            if name not in found.model.decoders:
                raise UsageError(f"{checkpoint} has no {name}: a tiny decoder is given with --vae-decoder FILE")
        return found, tile, decoder

    def _decoding(self, bundle: Path | None) -> tuple[Resolution | None, tuple[int, int] | None, str | None]:
        """The resolution, the tile of a decoder that has some, and the component that decodes."""
        if bundle is None:
            tile = None if self.vae_tile is None else parse_tile(self.vae_tile)
            return self.resolution, tile, None if self.decoder is None else DECODERS[self.decoder]
        manifest = open_bundle(bundle, resolution=self.resolution, decoder=self.decoder).manifest
        cut = [decoder for name, decoder in manifest.decoders.items() if manifest.model.decoders[name].cut]
        tile = cut[0].tiles.tile if cut else None
        return manifest.resolution, tile, manifest.decoder.component if manifest.decoder else None
