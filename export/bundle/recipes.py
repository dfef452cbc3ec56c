"""The recipe that a bundle is built by: opened, and held against the checkpoint that it is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.identity import checkpoint_digest, checkpoint_files
from ...runtime.model.safetensors import TensorEntry, read_header
from ...runtime.quantisation import SCHEMES
from ...runtime.ranges import output_of
from ...runtime.recipe import Calibration, read_calibration
from ..families import modules_of

__all__ = ["RecipeFile", "open_recipe"]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that fits."""

    sha256: str
    """Of its content."""
    prompts: int
    """Number of the prompts that it was made of."""
    kept: frozenset[str]
    """Layers that it keeps as their component's other weights are."""
    intervals: Mapping[str, tuple[tuple[float, float], ...]]
    """Of each layer whose input is rounded by constants, and each output that is: what integers are to hold in each
    stage, finest first."""
    warnings: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]


def open_recipe(checkpoint: Checkpoint, methods: Mapping[str, str], file: Path | None) -> RecipeFile | None:
    """The recipe of a build, where it has one.

    Args:
        checkpoint: that is to be built.
        methods: schemes of the matrices of blocks, by component.
        file: what `pyrexport calibrate` wrote.

    Raises:
        UsageError: there is none and one is needed, or the other way round; it is of another checkpoint or method, or
            malformed.
    """
    static = [name for name in methods.values() if SCHEMES[name].activations == "static"]
    if file is None and static:
        raise UsageError(
            f"the method {static[0]} needs the ranges of activations: make a recipe with "
            f"'pyrexport calibrate --quantize {SCHEMES[static[0]].recipes}', and give it with --recipe"
        )
    if file is None:
        return None
    found = read_calibration(file)
    try:
        _check_fits(found, checkpoint, methods)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    rounded = {name: choice for name, choice in found.choices.items() if choice.scheme}
    return RecipeFile(
        sha256=found.hash,
        prompts=found.run.prompts,
        kept=frozenset(found.choices) - frozenset(rounded),
        intervals={
            name: tuple((float(low), float(high)) for low, high in found.of(name).interval(choice.migration))
            for name, choice in rounded.items()
            if SCHEMES[choice.scheme].activations == "static"
        },
        warnings=found.warnings,
        tensors=read_header(file),
    )


def _check_fits(found: Calibration, checkpoint: Checkpoint, methods: Mapping[str, str]) -> None:
    for component, method in found.methods.items():
        asked = methods.get(component)
        if asked is None or SCHEMES[asked].recipes != method:
            asked = asked or "no --quantize of it"
            raise UsageError(f"the recipe is for --quantize {component}={method}, found {asked}: give that")
    for component, method in methods.items():
        if SCHEMES[method].activations == "static" and component not in found.methods:
            asked = f"--quantize {component}={SCHEMES[method].recipes}"
            raise UsageError(f"the recipe says nothing of the {component}: calibrate with {asked}")
    widths: dict[str, int] = {}
    for component in found.methods:
        for layer in modules_of(checkpoint.model.family).block_matrices(checkpoint, component):
            out, width = checkpoint.components[component][f"{layer}.weight"].shape[:2]
            widths |= {layer: width} | ({output_of(layer): out} if component == "vae" else {})
    found.check_fits(checkpoint_digest(checkpoint_files(checkpoint)), widths, checkpoint.model.pyramid.depth)
