"""From the ranges of layers to a recipe: each group of layers that share an input has its numbers chosen."""

from collections.abc import Mapping

from ..export.families import modules_of
from ..export.reference.reference import Reference
from ..export.weights.edits import read_tensor
from ..runtime.choices import Choice
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.quantisation import SCHEMES, Scheme
from ..runtime.ranges import Ranges
from ..runtime.recipe import Calibration
from ..runtime.reporter import Reporter
from ..runtime.trajectories import Trajectories
from ..targets.facts import DEFAULT_TARGET, find_build_target
from .search import choose_numbers, convolution_numbers

__all__ = ["decide", "schemes_of"]


def schemes_of(method: str) -> dict[str, Scheme]:
    """A method's scheme by its name, as the default target stores it."""
    target = find_build_target(DEFAULT_TARGET)
    return {method: target.adapted(SCHEMES[method], target.resolve_options({}))}


def decide(
    reference: Reference,
    run: Trajectories,
    layers: Mapping[str, Ranges],
    methods: Mapping[str, str],
    reporter: Reporter,
) -> Calibration:
    """Choose by what each layer is rounded; a group of weights is in memory at a time.

    Args:
        reference: of the checkpoint.
        run: that the ranges are of.
        layers: their ranges.
        methods: of `METHODS`, by component.
        reporter: told of the groups.
    """
    choices: dict[str, Choice] = {}
    for component, method in methods.items():
        choose = _of_transformer if component == "transformer" else _of_decoder
        choices |= choose(reference.checkpoint, layers, method, reporter)
    return Calibration(run, layers, dict(methods), {layer: choices[layer] for layer in layers})


def _of_transformer(
    checkpoint: Checkpoint, layers: Mapping[str, Ranges], method: str, reporter: Reporter
) -> dict[str, Choice]:
    family, scheme = modules_of(checkpoint.model.family), schemes_of(method)[method]
    migrations = [group for group in family.migrations(checkpoint) if group[0] in layers]
    grouped = {layer for group in migrations for layer in group}
    matrices = [layer for layer in layers if f"{layer}.weight" in checkpoint.transformer]
    groups = [*migrations, *((layer,) for layer in matrices if layer not in grouped)]
    choices: dict[str, Choice] = {}
    reporter.begin("choice of numbers", len(groups))
    for group in groups:
        weights = {layer: read_tensor(checkpoint.transformer[f"{layer}.weight"]) for layer in group}
        choices |= choose_numbers(weights, layers[group[0]], scheme, method, migrates=group in migrations)
        reporter.advance(1)
    return choices


def _of_decoder(
    checkpoint: Checkpoint, layers: Mapping[str, Ranges], method: str, reporter: Reporter
) -> dict[str, Choice]:
    scheme, choices = schemes_of(method)[method], dict[str, Choice]()
    names = modules_of(checkpoint.model.family).block_matrices(checkpoint, "vae")
    reporter.begin("choice of the decoder's numbers", len(names))
    for layer in names:
        if layer not in layers:
            raise UsageError(f"layer '{layer}' of the decoder was never used: calibrate at a longer resolution")
        weight = read_tensor(checkpoint.vae[f"{layer}.weight"])
        choices |= convolution_numbers(layer, weight, layers, scheme, method)
        reporter.advance(1)
    return choices
