"""How a checkpoint is to be stored and cut: what a user asks for, and what follows from it for a target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.bundle.graphs import Decoder
from ...runtime.bundle.manifest import Manifest
from ...runtime.bundle.tiles import Tiles, parse_tile
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.quantisation import CACHE_SCHEMES, COMPONENTS, FLOAT_SCHEMES, METHODS, SCHEMES, Recipe, Scheme
from ...targets.facts import BuildTarget
from ..families import modules_of
from .recipes import RecipeFile, open_recipe

__all__ = ["BuildOptions", "BuildRequest", "Choices", "choose_tile", "options_of", "resolve_options"]

VAE_BUDGET = 2_300_000_000
"""Memory that decoding may take before frames are cut into tiles, in bytes: a sample then stays below 2.5 GB."""

# Fitted to ONNX Runtime's plans of Wan2.1's decoder at 81x448x832, tiles of 1,120 to 2,288 latent pixels (1 %).
DECODER_BASE = 404_000_000
"""What a decoder takes whatever its tile, in bytes."""

ACTIVATIONS, CACHES = 2.143, 0.684
"""What it takes by the bytes of its caches in float32: for all else, and for the caches as they are kept."""

LEAST_CHOSEN = 16
"""Height and width of the smallest tile that is chosen: its overlaps are 4 latent pixels wide, 32 of the video."""


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


@dataclass(frozen=True)
class BuildOptions:
    """A request that was found possible, with what it leaves open decided."""

    resolution: Resolution
    precision: Mapping[str, str]
    """By component: the scheme of what is stored in floating-point numbers."""
    quantised: Mapping[str, Scheme]
    """By component: the scheme of the matrices of its blocks, as its target stores it."""
    vae_tile: tuple[int, int] | None
    """Height and width of a tile in latent pixels; None: frames are decoded whole."""
    vae_caches: str
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

    def decoder(self, checkpoint: Checkpoint, *, packed: bool) -> Decoder | None:
        """How frames are decoded, where there is a VAE."""
        if not checkpoint.vae:
            return None
        frame = _frame(checkpoint, self.resolution)
        height, width = self.vae_tile or frame
        tile = (min(height, frame[0]), min(width, frame[1]))
        tiles = Tiles(frame, tile, checkpoint.model.pyramid.geometry.spatial)
        return Decoder(tiles, SCHEMES[self.vae_caches].dtype, packed)


def resolve_options(checkpoint: Checkpoint, target: BuildTarget, request: BuildRequest) -> BuildOptions:
    """What a request means for a checkpoint and a target.

    Raises:
        UsageError: a precision, a method or a tile is not known or does not fit, the target cannot take it, or an
            option is for a component that is not there.
    """
    precision = dict.fromkeys(COMPONENTS, "fp32") | _chosen(checkpoint, request.precision, "precision", FLOAT_SCHEMES)
    methods = _chosen(checkpoint, request.quantize, "quantisation", METHODS)
    if request.vae_caches not in CACHE_SCHEMES:
        raise UsageError(
            f"unknown precision '{request.vae_caches}' of the decoder's caches: "
            f"expected one of {', '.join(CACHE_SCHEMES)}"
        )
    for component, name in [*precision.items(), *methods.items()]:
        _check_taken(target, component, name, target.schemes)
    _check_taken(target, "decoder's caches", request.vae_caches, target.cache_schemes)
    if target.computes_as_stored and not checkpoint.model.family.text_in_fp16 and precision["text_encoder"] == "fp16":
        raise UsageError(
            f"target '{target.name}' computes as it stores, and UMT5 leaves fp16's range: "
            "take --precision text_encoder=bf16"
        )
    own = target.resolve_options(request.target)
    return BuildOptions(
        resolution=checkpoint.resolution,
        precision=precision,
        quantised={component: target.adapted(SCHEMES[name], own) for component, name in methods.items()},
        vae_tile=_tile(checkpoint, request),
        vae_caches=request.vae_caches,
        target=own,
        calibration=open_recipe(checkpoint, methods, request.recipe),
    )


def _chosen(checkpoint: Checkpoint, choices: Choices, what: str, known: Sequence[str]) -> dict[str, str]:
    """A request's values by component, each of which is there and can take its value."""
    given = {"transformer": choices} if isinstance(choices, str) else dict(choices or {})
    for component, name in given.items():
        if component not in COMPONENTS:
            raise UsageError(f"unknown component '{component}' of a {what}: expected one of {', '.join(COMPONENTS)}")
        if component not in checkpoint.components:
            raise UsageError(f"{checkpoint.folder} has no {component}: a {what} of it says nothing")
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


def _tile(checkpoint: Checkpoint, request: BuildRequest) -> tuple[int, int] | None:
    if not checkpoint.vae:
        if request.vae_tile not in ("auto", "none") or request.vae_caches != "fp32":
            raise UsageError(f"{checkpoint.folder} has no VAE: a tile or caches of it say nothing")
        return None
    if request.vae_tile == "none":
        return None
    if request.vae_tile == "auto":
        return choose_tile(checkpoint, request.vae_caches)
    tile, (height, width) = parse_tile(request.vae_tile), _frame(checkpoint, checkpoint.resolution)
    if tile[0] > height or tile[1] > width:
        raise UsageError(f"a tile of {request.vae_tile} latent pixels is larger than the frame's {height}x{width}")
    return tile


def options_of(manifest: Manifest, target: BuildTarget) -> BuildOptions:
    """The options that a bundle of a target was built with."""
    caches = {SCHEMES[name].dtype: name for name in CACHE_SCHEMES}
    decoder = manifest.decoder
    return BuildOptions(
        resolution=manifest.resolution,
        precision=manifest.precision,
        quantised={
            component: target.adapted(SCHEMES[name], manifest.target_options)
            for component, name in manifest.quantised.items()
        },
        vae_tile=None if decoder is None else decoder.tiles.tile,
        vae_caches="fp32" if decoder is None else caches[decoder.caches],
        target=manifest.target_options,
    )


def _frame(checkpoint: Checkpoint, resolution: Resolution) -> tuple[int, int]:
    _, _, height, width = checkpoint.model.stages(resolution)[0].latent
    return height, width


def choose_tile(checkpoint: Checkpoint, caches: str = "fp32") -> tuple[int, int] | None:
    """The tile that costs the least beyond the frame and whose decoding fits `VAE_BUDGET`; None if the frame does.

    Thin strips would cost even less, but show a pixel near their edge little of what is around it.
    """
    assert checkpoint.model.decoder is not None
    frame = _frame(checkpoint, checkpoint.resolution)
    shapes = checkpoint.model.decoder.cache_shapes(LEAST_CHOSEN, LEAST_CHOSEN)
    per_pixel = 4 * sum(math.prod(shape) for shape in shapes) / LEAST_CHOSEN**2
    kept = 0.5 if caches == "fp16" else 1.0

    def estimate(height: int, width: int) -> float:
        pixels = height * width
        # The decoder's attention, near its start, holds its scores and their softmax beside the old caches.
        step = max((ACTIVATIONS + CACHES * kept) * per_pixel * pixels, kept * per_pixel * pixels + 2 * 4 * pixels**2)
        return DECODER_BASE + step

    if estimate(*frame) <= VAE_BUDGET:
        return None
    sizes = [sorted({_cover(size, count) for count in range(1, 65)}) for size in frame]
    plans = [Tiles(frame, (h, w)) for h in sizes[0] for w in sizes[1] if estimate(h, w) <= VAE_BUDGET]
    return min(plans, key=lambda plan: (plan.overhead, plan.count)).tile if plans else (sizes[0][0], sizes[1][0])


def _cover(size: int, count: int) -> int:
    """The smallest tile of which `count`, overlapping by a quarter, cover a length."""
    return next(
        tile
        for tile in range(min(LEAST_CHOSEN, size), size + 1)
        if len(Tiles((size, size), (tile, tile)).rows) <= count
    )
