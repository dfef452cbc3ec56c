"""How `parity` records a reference: which runs, and at which sizes."""

from dataclasses import dataclass
from pathlib import Path

from ..runtime.bundle.opening import open_bundle
from ..runtime.bundle.tiles import parse_tile
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.schedules import parse_levels
from .common import progress, read_prompts, resolve_checkpoint

__all__ = ["Recording"]

DEFAULT_PROMPTS = ("a red circle moving left", "Two cats box on a stage, in the style of an old film.")
DEFAULT_SEEDS = (0,)


@dataclass(frozen=True)
class Recording:
    """What was asked of a recording on the command line."""

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    schedule: str | None = None
    levels: str | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    negative_prompt: str | None = None
    variant: str | None = None
    vae_tile: str | None = None
    decode: bool = True

    def write(self, checkpoint: Path, trace: Path, bundle: Path | None, quiet: bool) -> None:
        """Record a checkpoint; beside a bundle, at its resolution and on a tile of its size."""
        resolution, tile = self._sizes(bundle)
        found = resolve_checkpoint(checkpoint, resolution, self.variant)
        levels = None if self.levels is None else parse_levels(self.levels)
        chosen = found.model.schedule(
            self.schedule, levels=levels, guidance_scale=self.guidance_scale, solver=self.solver
        )
        words = read_prompts(self.prompts_file) if self.prompts_file else list(self.prompts or DEFAULT_PROMPTS)
        from ..export.reference.record import PROBES, record_trace

        total = len(PROBES) * found.model.pyramid.depth + len(words) * len(self.seeds) * sum(chosen.steps)
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
                vae_tile=tile,
                advance=lambda: bar.advance(task),
            )

    def _sizes(self, bundle: Path | None) -> tuple[Resolution | None, tuple[int, int] | None]:
        if bundle is None:
            return None, None if self.vae_tile is None else parse_tile(self.vae_tile)
        manifest = open_bundle(bundle).manifest
        return manifest.resolution, manifest.decoder.tiles.tile if manifest.decoder else None
