"""Recipes: what a model's layers were given on real sampling runs, and what becomes of each, in one file of data.

A layer is called by the checkpoint's name of it, such as `blocks.0.attn1.to_q`, and its output, where that is rounded
too, `LAYER:output`. The file holds `LAYER/FIELD` in float32 for each field of `Ranges`, and `LAYER/scale`,
`LAYER/zero`, `LAYER/migration`, `LAYER/blocks` where its `Choice` has them; what was run, and the choices, as JSON in
its metadata.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .choices import TENSORS, Choice
from .documents import Fields
from .errors import UsageError
from .model.signed import Arrays, content_hash, read_signed, write_signed
from .quantisation import METHODS
from .ranges import FIELDS, Ranges
from .trajectories import Trajectories

__all__ = ["KEY", "Calibration", "Trial", "read_calibration"]

KEY = "recipe"


@dataclass(frozen=True)
class Trial:
    """A try of the search for what to keep."""

    kept: int
    """Layers that were kept, those that damage most."""
    psnr: float
    """Median of the videos' PSNR in dB against those of no rounding; 100 where they are the same."""


@dataclass(frozen=True)
class Calibration:
    """A recipe: what was run, the ranges of each layer, and what becomes of it."""

    run: Trajectories
    layers: Mapping[str, Ranges]
    """By the checkpoint's name of the layer, in the order in which they run."""
    methods: Mapping[str, str]
    """By component: the method that its choices are for, of `quantisation.METHODS`."""
    choices: Mapping[str, Choice]
    """By layer."""
    target_psnr: float | None = None
    """What the search for layers to keep was to reach; None: there was none."""
    trials: tuple[Trial, ...] = ()
    """What it tried, in order."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.run.stages

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user should know."""
        lines = []
        if self.run.prompts == 1:
            lines.append("the recipe is made of one prompt: ranges of others will leave it; calibrate with dozens")
        if self.run.text == "noise":
            lines.append("the checkpoint has no text encoder: the recipe is made of noise in place of prompts")
        return tuple(lines)

    @property
    def hash(self) -> str:
        """SHA-256 of all of its content."""
        return content_hash(self._document(), self._arrays())

    def of(self, layer: str) -> Ranges:
        """The ranges of a layer.

        Raises:
            UsageError: it has none.
        """
        if layer not in self.layers:
            raise UsageError(f"the recipe has no layer '{layer}': calibrate this checkpoint")
        return self.layers[layer]

    def check(self) -> None:
        """Refuse what no run can have given, and choices that nothing can be rounded by.

        Raises:
            UsageError: there are no layers, or some are impossible: see `Ranges.check` and `Choice.check`.
        """
        if not self.layers:
            raise UsageError("the recipe has no layers; calibrate again")
        if set(self.choices) != set(self.layers):
            odd = min(set(self.choices) ^ set(self.layers))
            raise UsageError(f"the recipe has ranges or a choice of '{odd}', and not both; calibrate again")
        for name, ranges in self.layers.items():
            ranges.check(name, self.run)
            self.choices[name].check(name, ranges)

    def check_fits(self, checkpoint: str, widths: Mapping[str, int], depth: int) -> None:
        """Refuse to be used for another model.

        Args:
            checkpoint: SHA-256 of the checkpoint's files, as bundles record it.
            widths: input channels of each layer that is asked for.
            depth: number of stages.

        Raises:
            UsageError: it is of another checkpoint, or has other stages or layers; says what differs.
        """
        if self.run.checkpoint != checkpoint:
            raise UsageError(
                f"the recipe is of another checkpoint: expected one of {checkpoint[:12]}…, "
                f"found {self.run.checkpoint[:12]}…; calibrate this one"
            )
        if self.stages != depth:
            raise UsageError(f"the recipe is of another model: expected {depth} stage(s), found {self.stages}")
        for layer, width in widths.items():
            if self.of(layer).width != width:
                raise UsageError(
                    f"the recipe is of other layers: expected {width} input channels of '{layer}', "
                    f"found {self.of(layer).width}; calibrate this checkpoint"
                )

    def to_file(self, path: Path) -> None:
        """Write it, with its hash.

        Raises:
            UsageError: it is impossible, or the file cannot be written.
        """
        self.check()
        write_signed(path, KEY, self._document(), self._arrays())

    def _document(self) -> dict[str, Any]:
        return {
            **self.run.to_json(),
            "layers": [[name, ranges.width] for name, ranges in self.layers.items()],
            "methods": dict(self.methods),
            "choices": {name: choice.to_json() for name, choice in self.choices.items()},
            "target_psnr": self.target_psnr,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def _arrays(self) -> Arrays:
        ranges = {f"{name}/{field}": getattr(each, field) for name, each in self.layers.items() for field in FIELDS}
        chosen = {f"{n}/{tensor}": array for n, each in self.choices.items() for tensor, array in each.tensors.items()}
        return ranges | chosen


def read_calibration(path: Path) -> Calibration:
    """Read and check a recipe.

    Raises:
        UsageError: it is none, was changed since it was made, or holds what no run can have given.
    """
    document, arrays = read_signed(path, KEY, "a recipe of pyrexport calibrate")
    fields, run = Fields(document, str(path)), Trajectories.from_json(document, str(path))
    widths: dict[str, int] = dict(fields.get("layers", "pairs of a name and a width", _are_pairs))
    layers = {name: Ranges(**{field: _take(arrays, path, name, field) for field in FIELDS}) for name in widths}
    for name, ranges in layers.items():
        if ranges.lowest.ndim == 3 and ranges.width != widths[name]:
            raise UsageError(f"{path}: layer '{name}': expected {widths[name]} channels, found {ranges.width}")
    found = fields.object("choices")
    choices = {name: _choice(found, arrays, path, name) for name in found.document}
    if arrays:
        raise UsageError(f"{path}: unexpected tensor '{min(arrays)}'; calibrate again")
    methods = fields.object("methods")
    calibration = Calibration(
        run,
        layers,
        {component: methods.text(component, choices=METHODS) for component in methods.document},
        choices,
        None if document.get("target_psnr") is None else fields.number("target_psnr"),
        tuple(_trial(each, f"{path}: trials") for each in fields.get("trials", "a list", lambda v: type(v) is list)),
    )
    try:
        calibration.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return calibration


def _take(arrays: dict[str, NDArray[Any]], path: Path, layer: str, tensor: str) -> NDArray[Any]:
    if f"{layer}/{tensor}" not in arrays:
        raise UsageError(f"{path}: tensor '{layer}/{tensor}' is missing; calibrate again")
    return arrays.pop(f"{layer}/{tensor}")


def _choice(choices: Fields, arrays: dict[str, NDArray[Any]], path: Path, layer: str) -> Choice:
    found = choices.object(layer)
    names = found.get("tensors", f"names of {', '.join(TENSORS)}", _are_tensors)
    return Choice.from_json(found.document, found.source, {name: _take(arrays, path, layer, name) for name in names})


def _trial(document: Any, source: str) -> Trial:
    found = Fields(document, source)
    return Trial(found.integer("kept", least=0), found.number("psnr"))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(each in TENSORS for each in value)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
        for pair in value
    )
