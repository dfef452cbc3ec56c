"""How a checkpoint is to be stored and cut: what a user asks for, and what follows from it for a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...runtime.bundle.graphs import Decoder
from ...runtime.bundle.manifest import Manifest
from ...runtime.bundle.tiles import Tiles, parse_tile
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.description import Model
from ...runtime.quantisation import CACHE_SCHEMES, COMPONENTS, DECODERS, FLOAT_SCHEMES, METHODS, SCHEMES, Recipe, Scheme
from ...targets.facts import BuildTarget
from ..families import modules_of
from .recipes import RecipeFile, open_recipe
from .tiling import Tile, choose_tiles, frame_of

__all__ = ["BuildOptions", "BuildRequest", "Choices", "options_of", "resolve_options"]

Choices = str | Mapping[str, str] | None
"""A value for the transformer, or values by component."""


@dataclass(frozen=True)
class BuildRequest:
    """What a user asks for."""

    precision: Choices = None
    """Schemes of what is stored in floating-point numbers: names of `FLOAT_SCHEMES`."""
    quantize: Choices = None
    """Schemes of the matrices of blocks: names of `METHODS`."""
    recipe: Path | None = None
    """A file of `pyrexport calibrate`, for methods that need one."""
    vae_tile: str = "auto"
    """How frames are cut: "auto", "none", or "HEIGHTxWIDTH" in latent pixels."""
    vae_caches: str = "fp32"
    """Scheme of the decoder's caches: a name of `CACHE_SCHEMES`."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """The target's own options that were given, by name."""
    decoders: tuple[str, ...] = ()
    """Which of the checkpoint's decoders the bundle is to hold, names of `DECODERS`; none: all."""
    resolutions: tuple[Resolution, ...] = ()
    """That the bundle is to sample at, the default first; none: the checkpoint's own."""


@dataclass(frozen=True)
class BuildOptions:
    """A request that was found possible, with what it leaves open decided."""

    resolutions: tuple[Resolution, ...]
    """The default first."""
    precision: Mapping[str, str]
    """By component: the scheme of what is stored in floating-point numbers."""
    quantised: Mapping[str, Scheme]
    """By component: the scheme of the matrices of its blocks, as its target stores it."""
    vae_tiles: tuple[Tile, ...]
    """Of each resolution: height and width of a tile in latent pixels; None: frames are decoded whole."""
    vae_caches: str
    decoders: tuple[str, ...]
    """Components that decode."""
    target: Mapping[str, Any]
    """A value for each of the target's own options, as JSON."""
    calibration: RecipeFile | None = None
    """The recipe that it is built by."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user should know of the recipe."""
        return () if self.calibration is None else self.calibration.warnings

    def recipe(self, checkpoint: Checkpoint, component: str, stage: int = 0) -> Recipe:
        """The scheme of each of a component's layers, and the ranges of their inputs in a stage."""
        scheme = self.quantised.get(component)
        layers = () if scheme is None else modules_of(checkpoint.model.family).block_matrices(checkpoint, component)
        found = self.calibration
        kept = frozenset() if found is None else found.kept
        schemes = {layer: scheme for layer in layers if scheme is not None and layer not in kept}
        calibrated = {} if found is None else found.tensors
        return Recipe(SCHEMES[self.precision[component]], schemes, calibrated, stage)

    def model(self, checkpoint: Checkpoint) -> Model:
        """The checkpoint's model, with the decoders that the bundle holds."""
        own = checkpoint.model.decoders
        return replace(checkpoint.model, decoders={component: own[component] for component in self.decoders})

    def decoders_of(self, checkpoint: Checkpoint, *, packed: bool) -> dict[Resolution, list[Decoder]]:
        """How frames of each resolution are decoded."""
        found, dtype = dict[Resolution, list[Decoder]](), SCHEMES[self.vae_caches].dtype
        spatial = checkpoint.model.pyramid.geometry.spatial
        for resolution, tile in zip(self.resolutions, self.vae_tiles, strict=True):
            frame = frame_of(checkpoint, resolution)
            found[resolution] = [
                Decoder(component, Tiles(frame, (tile if config.cut else None) or frame, spatial), dtype, packed)
                for component, config in self.model(checkpoint).decoders.items()
            ]
        return found


def resolve_options(checkpoint: Checkpoint, target: BuildTarget, request: BuildRequest) -> BuildOptions:
    """What a request means for a checkpoint and a target.

    Raises:
        UsageError: a precision, a method or a tile is not known or does not fit, the target cannot take it, or an
            option is for a component that is not there.
    """
    decoders = _decoders(checkpoint, request.decoders)
    precision = {each: _first(target.takes(each)) for each in COMPONENTS}
    precision |= _chosen(checkpoint, decoders, request.precision, "precision", FLOAT_SCHEMES)
    methods = _chosen(checkpoint, decoders, request.quantize, "quantisation", METHODS)
    if request.vae_caches not in CACHE_SCHEMES:
        raise UsageError(
            f"unknown precision '{request.vae_caches}' of the decoder's caches: "
            f"expected one of {', '.join(CACHE_SCHEMES)}"
        )
    for component, name in [*precision.items(), *methods.items()]:
        _check_taken(target, component, name, target.takes(component))
    _check_taken(target, "decoder's caches", request.vae_caches, target.cache_schemes)
    if target.computes_as_stored and not checkpoint.model.family.text_in_fp16 and precision["text_encoder"] == "fp16":
        raise UsageError(
            f"target '{target.name}' computes as it stores, and UMT5 leaves fp16's range: "
            "take --precision text_encoder=bf16"
        )
    own, resolutions = target.resolve_options(request.target), _resolutions(checkpoint, request)
    return BuildOptions(
        resolutions=resolutions,
        precision=precision,
        quantised={component: target.adapted(SCHEMES[name], own) for component, name in methods.items()},
        vae_tiles=_tiles(checkpoint, decoders, request, resolutions),
        vae_caches=request.vae_caches,
        decoders=decoders,
        target=own,
        calibration=open_recipe(checkpoint, methods, request.recipe),
    )


def _decoders(checkpoint: Checkpoint, asked: Sequence[str]) -> tuple[str, ...]:
    """Components that are to decode, in the order of `DECODERS`."""
    there = [name for name, component in DECODERS.items() if component in checkpoint.model.decoders]
    for name in asked:
        if name not in there:
            found = f"has {' and '.join(there)}" if there else "has none"
            raise UsageError(
                f"{checkpoint.folder} {found}: there is no {name} decoder to be built; "
                "a tiny one is given with --vae-decoder FILE"
            )
    return tuple(DECODERS[name] for name in asked or there if name in DECODERS)


def _first(takes: Sequence[str]) -> str:
    """What is stored where nobody asks for anything else."""
    return "fp32" if "fp32" in takes else takes[0]


def _chosen(
    checkpoint: Checkpoint, decoders: Sequence[str], choices: Choices, what: str, known: Sequence[str]
) -> dict[str, str]:
    """A request's values by component, each of which is there, is built, and can take its value."""
    given = {"transformer": choices} if isinstance(choices, str) else dict(choices or {})
    for component, name in given.items():
        if component not in COMPONENTS:
            raise UsageError(f"unknown component '{component}' of a {what}: expected one of {', '.join(COMPONENTS)}")
        if component not in checkpoint.components:
            raise UsageError(f"{checkpoint.folder} has no {component}: a {what} of it says nothing")
        if component in checkpoint.model.decoders and component not in decoders:
            raise UsageError(f"--decoder leaves the {component} out: a {what} of it says nothing")
        takes = [scheme for scheme in known if component in SCHEMES[scheme].components]
        if name not in takes:
            expected = f"expected one of {', '.join(takes)}" if takes else "it takes none"
            raise UsageError(f"the {component} has no {what} '{name}': {expected}")
    return given


def _check_taken(target: BuildTarget, what: str, name: str, takes: Sequence[str]) -> None:
    if name not in takes:
        raise UsageError(
            f"target '{target.name}' takes the {what} in {' or '.join(takes)}, found {name}: "
            "build for another target, or in that precision"
        )


def _resolutions(checkpoint: Checkpoint, request: BuildRequest) -> tuple[Resolution, ...]:
    """Those that were asked for, each of which the model can sample at."""
    found = request.resolutions or (checkpoint.resolution,)
    for index, resolution in enumerate(found):
        if resolution in found[:index]:
            raise UsageError(f"the resolution {resolution} is given twice")
        checkpoint.model.stages(resolution)
    return found


def _tiles(
    checkpoint: Checkpoint, decoders: Sequence[str], request: BuildRequest, resolutions: Sequence[Resolution]
) -> tuple[Tile, ...]:
    """The tile of each resolution; None: the whole frame, or none of what is built decodes in tiles."""
    frames = [frame_of(checkpoint, resolution) for resolution in resolutions]
    cut = [name for name, config in checkpoint.model.decoders.items() if config.cut]
    if not set(cut) & set(decoders):
        if request.vae_tile not in ("auto", "none") or request.vae_caches != "fp32":
            why = "--decoder leaves the VAE out" if cut else f"{checkpoint.folder} has no VAE"
            raise UsageError(f"{why}: a tile or caches of it say nothing")
        return (None,) * len(frames)
    if request.vae_tile == "none":
        return (None,) * len(frames)
    if request.vae_tile == "auto":
        return choose_tiles(checkpoint, frames, request.vae_caches)
    tile = parse_tile(request.vae_tile)
    for height, width in frames:
        if tile[0] > height or tile[1] > width:
            raise UsageError(f"a tile of {request.vae_tile} latent pixels is larger than the frame's {height}x{width}")
    return (tile,) * len(frames)


def options_of(
    manifest: Manifest, target: BuildTarget, checkpoint: Checkpoint, recipe: Path | None = None
) -> BuildOptions:
    """The options that a bundle of a target was built with, from a checkpoint and, where it has one, its recipe.

    Raises:
        UsageError: the recipe is missing, or not the one.
    """
    caches = {SCHEMES[name].dtype: name for name in CACHE_SCHEMES}
    cut = [name for name, config in manifest.model.decoders.items() if config.cut]
    missing = sorted(manifest.decoders.keys() - checkpoint.model.decoders.keys())
    if missing:
        raise UsageError(
            f"the bundle has a {missing[0]}, and {checkpoint.folder} has none: give it as when it was built"
        )
    return BuildOptions(
        resolutions=manifest.resolutions,
        precision=manifest.precision,
        quantised={
            component: target.adapted(SCHEMES[name], manifest.target_options)
            for component, name in manifest.quantised.items()
        },
        vae_tiles=tuple(next((size.decoders[name].tiles.tile for name in cut), None) for size in manifest.sizes),
        vae_caches=next((caches[decoder.caches] for decoder in manifest.decoders.values()), "fp32"),
        decoders=tuple(manifest.decoders),
        target=manifest.target_options,
        calibration=_same_recipe(manifest, checkpoint, recipe),
    )


def _same_recipe(manifest: Manifest, checkpoint: Checkpoint, file: Path | None) -> RecipeFile | None:
    """The recipe that a bundle was built by."""
    told = manifest.provenance.get("recipe")
    if told is None:
        if file is not None:
            raise UsageError("the bundle was built without a recipe: leave out --recipe")
        return None
    if file is None:
        raise UsageError(f"the bundle was built by a recipe, {told['sha256'][:12]}…: give it with --recipe")
    found = open_recipe(checkpoint, manifest.quantised, file)
    assert found is not None
    if found.sha256 != told["sha256"]:
        raise UsageError(
            f"{file} is not the recipe that the bundle was built by: expected {told['sha256'][:12]}…, "
            f"found {found.sha256[:12]}…"
        )
    return found
