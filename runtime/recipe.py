"""Recipes: what the inputs of a model's layers were on real sampling runs, by stage, in one file of data.

A layer is called by the checkpoint's name of it, such as `blocks.0.attn1.to_q`. For each, in float32, the file holds

    LAYER/lowest, LAYER/highest   [stages]              least and greatest value of its input
    LAYER/magnitude               [stages]              the percentile of |x| that was asked for, from above by 1/64
    LAYER/channels                [stages, groups, in]  greatest |x| of each channel, the first frame apart where the
                                                        model keeps it apart; one group where the input is text
    LAYER/scale, LAYER/zero       [stages]              what makes it 8-bit integers: x ≈ scale · (q - zero)
    LAYER/passes                  [stages, passes]      greatest |x| with the prompt, and with the negative one
    LAYER/steps                   [steps]               greatest |x| in each step of the schedule, the noisiest first

with stages finest first, and what was run as JSON in its metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .documents import Fields
from .errors import UsageError
from .model.signed import Arrays, content_hash, read_signed, write_signed
from .trajectories import Trajectories

__all__ = ["KEY", "Calibration", "Ranges", "integer_range", "read_calibration"]

KEY = "recipe"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """What the input of a layer was; see the head of the module."""

    lowest: Floats
    highest: Floats
    magnitude: Floats
    channels: Floats
    passes: Floats
    steps: Floats
    scale: Floats
    zero: Floats
    """Whole numbers from 0 to 255."""

    @property
    def width(self) -> int:
        """Channels of the input."""
        return int(self.channels.shape[-1])

    @property
    def maximum(self) -> Floats:
        """Greatest |x| by stage [stages]."""
        return np.maximum(np.abs(self.lowest), np.abs(self.highest))

    def check(self, name: str, run: Trajectories) -> None:
        """Refuse what no run can have given.

        Raises:
            UsageError: a shape is wrong, a value is not finite or negative, or a range is empty; names layer and stage.
        """
        stages = run.stages
        groups = self.channels.shape[1] if self.channels.ndim == 3 and self.channels.shape[1] == 1 else len(run.groups)
        shapes = {
            **dict.fromkeys(("lowest", "highest", "magnitude", "scale", "zero"), (stages,)),
            "channels": (stages, groups, self.channels.shape[-1] if self.channels.ndim else 1),
            "passes": (stages, len(run.passes)),
            "steps": (sum(run.schedule.steps),),
        }
        for field, shape in shapes.items():
            array: Floats = getattr(self, field)
            where = f"layer '{name}', {field}"
            if array.shape != shape or not array.size or array.dtype != np.float32:
                found = f"{array.dtype} {list(array.shape)}"
                raise UsageError(f"{where}: expected float32 {list(shape)}, found {found}; calibrate again")
            if not np.isfinite(array).all():
                raise UsageError(f"{where}: not all values are finite; calibrate again")
            if field not in ("lowest", "highest") and (array < 0).any():
                raise UsageError(f"{where}: a magnitude is not negative, found {array.min():g}; calibrate again")
        if not (self.scale > 0).all() or (self.zero != self.zero.round()).any() or self.zero.max() > 255:
            raise UsageError(f"layer '{name}': expected scales above 0 and zeros from 0 to 255; calibrate again")
        if (self.lowest > self.highest).any():
            raise UsageError(f"layer '{name}': the least value is above the greatest; calibrate again")
        for stage in range(stages):
            ranges = (self.maximum[stage], self.magnitude[stage], *self.channels[stage].max(axis=1))
            if not min(ranges) > 0:
                raise UsageError(
                    f"layer '{name}', stage {stage}: a range is zero: its input was never anything else; "
                    "give other prompts, or look for a fault of the checkpoint"
                )


def integer_range(lowest: Floats, highest: Floats, magnitude: Floats) -> tuple[Floats, Floats]:
    """Scale and zero of 8-bit integers that hold a range and zero itself, values beyond a magnitude being cut."""
    low, high = (np.clip(side, 0, magnitude) for side in (-lowest, highest))
    scale = ((low + high) / np.float32(255)).astype(np.float32)
    return scale, np.rint(low / scale).astype(np.float32)


FIELDS = tuple(field.name for field in fields(Ranges))


@dataclass(frozen=True)
class Calibration:
    """A recipe: what was run, and the ranges of each layer."""

    run: Trajectories
    layers: Mapping[str, Ranges]
    """By the checkpoint's name of the layer, in the order in which they run."""

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
        """Refuse ranges that no run can have given.

        Raises:
            UsageError: there are none at all, or some are impossible: see `Ranges.check`.
        """
        if not self.layers:
            raise UsageError("the recipe has no layers; calibrate again")
        for name, ranges in self.layers.items():
            ranges.check(name, self.run)

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
            UsageError: its ranges are impossible, or the file cannot be written.
        """
        self.check()
        write_signed(path, KEY, self._document(), self._arrays())

    def _document(self) -> dict[str, Any]:
        return {**self.run.to_json(), "layers": [[name, ranges.width] for name, ranges in self.layers.items()]}

    def _arrays(self) -> Arrays:
        return {f"{name}/{field}": getattr(ranges, field) for name, ranges in self.layers.items() for field in FIELDS}


def read_calibration(path: Path) -> Calibration:
    """Read and check a recipe.

    Raises:
        UsageError: it is none, was changed since it was made, or holds what no run can have given.
    """
    document, arrays = read_signed(path, KEY, "a recipe of pyrexport calibrate")
    run = Trajectories.from_json(document, str(path))
    widths: dict[str, int] = dict(Fields(document, str(path)).get("layers", "pairs of a name and a width", _are_pairs))
    missing = [f"{name}/{field}" for name in widths for field in FIELDS if f"{name}/{field}" not in arrays]
    if missing:
        raise UsageError(f"{path}: tensor '{missing[0]}' is missing; calibrate again")
    layers = {name: Ranges(**{field: arrays.pop(f"{name}/{field}") for field in FIELDS}) for name in widths}
    if arrays:
        raise UsageError(f"{path}: unexpected tensor '{min(arrays)}'; calibrate again")
    for name, ranges in layers.items():
        if ranges.channels.ndim == 3 and ranges.width != widths[name]:
            raise UsageError(f"{path}: layer '{name}': expected {widths[name]} channels, found {ranges.width}")
    calibration = Calibration(run, layers)
    try:
        calibration.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return calibration


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
        for pair in value
    )
