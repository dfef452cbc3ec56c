"""What the input of a layer was on real sampling runs, by stage, and the integers that hold it."""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .trajectories import Trajectories

__all__ = ["FIELDS", "Floats", "Ranges", "integer_range", "output_of"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """What the input of a layer was; stages finest first. All in float32."""

    lowest: Floats
    """Least value of each channel [stages, groups, in]: the first frame apart where the model keeps it apart, one group
    where the input is text."""
    highest: Floats
    """Greatest value of each [stages, groups, in]."""
    square: Floats
    """Mean x² of each [stages, in]."""
    magnitude: Floats
    """The percentile of |x| that was asked for [stages], from above by 1/64."""
    passes: Floats
    """Greatest |x| with the prompt, and with the negative one [stages, passes]."""
    steps: Floats
    """Greatest |x| in each step of the schedule [steps], the noisiest first."""

    @property
    def width(self) -> int:
        """Channels of the input."""
        return int(self.lowest.shape[-1])

    @property
    def channels(self) -> Floats:
        """Greatest |x| of each channel [stages, groups, in]."""
        return np.maximum(np.abs(self.lowest), np.abs(self.highest))

    @property
    def maximum(self) -> Floats:
        """Greatest |x| by stage [stages]."""
        found: Floats = self.channels.max(axis=(1, 2))
        return found

    def interval(self, migration: Floats | None = None) -> Floats:
        """Ends [stages, 2] of what integers are to hold: all values and zero, but for what the magnitude cuts.

        Args:
            migration: [in], what channels are divided by before they are rounded.
        """
        divisor = np.float32(1) if migration is None else migration
        low, high = (self.lowest / divisor).min(axis=(1, 2)), (self.highest / divisor).max(axis=(1, 2))
        limit = np.maximum(np.abs(low), np.abs(high)) * (self.magnitude / self.maximum)
        return np.stack((-np.clip(-low, 0, limit), np.clip(high, 0, limit)), axis=1).astype(np.float32)

    def in_stages(self, stages: int) -> "Ranges":
        """The same in each stage, of what knows of none: a decoder."""
        fields = ("lowest", "highest", "square", "magnitude", "passes")
        return replace(self, **{field: np.repeat(getattr(self, field), stages, axis=0) for field in fields})

    def check(self, name: str, run: Trajectories) -> None:
        """Refuse what no run can have given.

        Raises:
            UsageError: a shape is wrong, a value is not finite or negative, or a range is empty; names layer and stage.
        """
        self._check_arrays(name, run)
        if (self.lowest > self.highest).any():
            raise UsageError(f"layer '{name}': a least value is above the greatest; calibrate again")
        for stage in range(run.stages):
            if not min(self.magnitude[stage], *self.channels[stage].max(axis=1)) > 0:
                raise UsageError(
                    f"layer '{name}', stage {stage}: a range is zero: its input was never anything else; "
                    "give other prompts, or look for a fault of the checkpoint"
                )

    def _check_arrays(self, name: str, run: Trajectories) -> None:
        stages, width = run.stages, self.lowest.shape[-1] if self.lowest.ndim else 1
        groups = 1 if self.lowest.ndim == 3 and self.lowest.shape[1] == 1 else len(run.groups)
        shapes = {
            **dict.fromkeys(("lowest", "highest"), (stages, groups, width)),
            "square": (stages, width),
            "magnitude": (stages,),
            "passes": (stages, len(run.passes)),
            "steps": (sum(run.schedule.steps),),
        }
        for field, shape in shapes.items():
            array: Floats = getattr(self, field)
            check_array(f"layer '{name}', {field}", array, shape)
            if field not in ("lowest", "highest") and (array < 0).any():
                raise UsageError(
                    f"layer '{name}', {field}: expected nothing below 0, found {array.min():g}; calibrate again"
                )


def output_of(layer: str) -> str:
    """What the ranges of a layer's output are called, where it is rounded too."""
    return f"{layer}:output"


FIELDS = tuple(field.name for field in fields(Ranges))


def check_array(where: str, array: Floats, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape or type, or one that is not finite.

    Raises:
        UsageError: it is.
    """
    if array.shape != shape or not array.size or array.dtype != np.float32:
        found = f"{array.dtype} {list(array.shape)}"
        raise UsageError(f"{where}: expected float32 {list(shape)}, found {found}; calibrate again")
    if not np.isfinite(array).all():
        raise UsageError(f"{where}: not all values are finite; calibrate again")


def integer_range(interval: Floats) -> tuple[Floats, Floats]:
    """Scale and zero [stages] of 8-bit integers that hold intervals [stages, 2] around zero: x ≈ scale · (q - zero)."""
    scale = ((interval[:, 1] - interval[:, 0]) / np.float32(255)).astype(np.float32)
    return scale, np.rint(-interval[:, 0] / scale).astype(np.float32)
