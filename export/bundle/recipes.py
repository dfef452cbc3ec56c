"""The recipe that a bundle is built by: opened, and held against the checkpoint that it is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.identity import checkpoint_digest, checkpoint_files
from ...runtime.model.safetensors import TensorEntry, read_header
from ...runtime.quantisation import SCHEMES
from ...runtime.recipe import read_calibration
from ..families import modules_of

__all__ = ["RecipeFile", "open_recipe"]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that fits."""

    sha256: str
    """Of its content."""
    prompts: int
    """Number of the prompts that it was made of."""
    tensors: Mapping[str, TensorEntry]


def open_recipe(checkpoint: Checkpoint, methods: Mapping[str, str], file: Path | None) -> RecipeFile | None:
    """The recipe of a build, where its methods need one.

    Args:
        checkpoint: that is to be built.
        methods: schemes of the matrices of blocks, by component.
        file: what `pyrexport calibrate` wrote.

    Raises:
        UsageError: there is none and one is needed, or the other way round; it is of another checkpoint, or malformed.
    """
    static = [component for component, name in methods.items() if SCHEMES[name].activations == "static"]
    if not static and file is None:
        return None
    if not static:
        raise UsageError(f"{file}: no method of this build takes a recipe: leave it out, or give --quantize w8a8")
    if file is None:
        raise UsageError(
            f"the method {methods[static[0]]} needs the ranges of activations: make a recipe with "
            "'pyrexport calibrate', and give it with --recipe"
        )
    found = read_calibration(file)
    widths = {
        layer: checkpoint.components[component][f"{layer}.weight"].shape[1]
        for component in static
        for layer in modules_of(checkpoint.model.family).block_matrices(checkpoint, component)
    }
    try:
        found.check_fits(checkpoint_digest(checkpoint_files(checkpoint)), widths, checkpoint.model.pyramid.depth)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return RecipeFile(found.hash, found.run.prompts, read_header(file))
