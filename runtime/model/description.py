"""What `pyramid.json` says: the pyramid, and how to sample it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chain.levels import default_clean_levels, gain
from ..chain.pyramid import KINDS, Pyramid, Resolution
from ..chain.schedules import MAX_GUIDANCE, Schedule, explicit_levels, parse_steps, plain_levels, spaced_levels
from ..chain.wavelets import wavelet_taps
from ..documents import Fields, is_number
from ..errors import UsageError
from .families.wan import Patch, WanConfig

__all__ = ["PAPER_SCHEDULES", "ModelDescription", "ScheduleEntry", "bare_model", "describe_model", "plain_document"]

FORMAT = 1
PLAIN_RESOLUTION = Resolution(81, 480, 832)
"""What diffusers' WanPipeline samples by default."""

PAPER_SCHEDULES = {
    "2-2-1": {"steps": [2, 2, 1], "guidance_scale": 1.0},
    "2-2-2": {"steps": [2, 2, 2], "guidance_scale": 1.0},
    "1-1-1": {"steps": [1, 1, 1], "guidance_scale": 1.0},
    "20-20-10": {"steps": [20, 20, 10], "guidance_scale": 5.0},
}
"""Schedules of PyramidalWan (supplement A3 and the cost table)."""

PLAIN_SCHEDULES = {
    "4": {"steps": [4], "guidance_scale": 1.0},
    "2": {"levels": [list(plain_levels(3)[:2])], "guidance_scale": 1.0},
}
"""Schedules of distilled plain Wan (supplement A3): `set_timesteps(4)`, and the first two of `set_timesteps(3)`."""


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule as it is written: steps and shift, or levels; resolved for a pyramid by `schedule`."""

    steps: tuple[int, ...] = ()
    levels: tuple[tuple[float, ...], ...] = ()
    shift: float = 5.0
    guidance_scale: float = 1.0

    def schedule(self, name: str, pyramid: Pyramid) -> Schedule:
        """The levels for a pyramid.

        Raises:
            UsageError: they do not fit its stages.
        """
        try:
            levels = (
                explicit_levels(pyramid, self.levels) if self.levels else spaced_levels(pyramid, self.steps, self.shift)
            )
        except UsageError as error:
            raise UsageError(f"schedule '{name}': {error}") from None
        return Schedule(name, levels, self.guidance_scale)

    def to_json(self) -> dict[str, Any]:
        """As in `pyramid.json`."""
        how: dict[str, Any] = (
            {"levels": [list(group) for group in self.levels]}
            if self.levels
            else {"steps": list(self.steps), "shift": self.shift}
        )
        return how | {"guidance_scale": self.guidance_scale}


@dataclass(frozen=True)
class ModelDescription:
    """What `pyramid.json` says: the pyramid, and how to sample it."""

    pyramid: Pyramid
    wavelet: str | list[float]
    text_length: int
    schedules: Mapping[str, ScheduleEntry]
    default_schedule: str
    negative_prompt: str

    def schedule(
        self,
        name: str | None = None,
        *,
        guidance_scale: float | None = None,
        levels: list[list[float]] | None = None,
    ) -> Schedule:
        """The schedule to sample with.

        Args:
            name: of a schedule of the model, or steps such as "10-10-10", which are spaced with the default
                schedule's shift and guidance; the default schedule if None.
            guidance_scale: replaces the schedule's own.
            levels: explicit natural levels per stage, coarsest first, in place of a named schedule.

        Raises:
            UsageError: the name is unknown, or steps or levels do not fit the stages.
        """
        default = self.schedules[self.default_schedule]
        label = self.default_schedule if name is None else name
        if guidance_scale is not None and not 0 <= guidance_scale <= MAX_GUIDANCE:
            raise UsageError(
                f"a guidance scale lies within 0 … {MAX_GUIDANCE:g} (1 and below: no guidance), found {guidance_scale:g}"
            )
        if levels is not None:
            if name is not None:
                raise UsageError("give a schedule by name or by levels, not both")
            label, entry = (
                "levels",
                ScheduleEntry((), tuple(map(tuple, levels)), default.shift, default.guidance_scale),
            )
        elif label in self.schedules:
            entry = self.schedules[label]
        elif steps := parse_steps(label):
            entry = ScheduleEntry(steps, (), default.shift, default.guidance_scale)
        else:
            raise UsageError(
                f"unknown schedule '{label}': expected one of {', '.join(self.schedules)}, or steps per stage such as 2-2-1"
            )
        schedule = entry.schedule(label, self.pyramid)
        if guidance_scale is None:
            return schedule
        return Schedule(schedule.name, schedule.levels, guidance_scale)

    def to_json(self) -> dict[str, Any]:
        """The document that `describe_model` reads."""
        pyramid = self.pyramid
        size = pyramid.resolution
        return {
            "format": FORMAT,
            "kind": pyramid.kind,
            "stages": pyramid.depth,
            "wavelet": self.wavelet,
            "axes": pyramid.axes or "THW",
            "first_frame": "separate" if pyramid.first_frame_apart else "joint",
            "clean_levels": list(pyramid.clean_levels),
            "resolution": {"frames": size.frames, "height": size.height, "width": size.width},
            "text_length": self.text_length,
            "schedules": {name: entry.to_json() for name, entry in self.schedules.items()},
            "default_schedule": self.default_schedule,
            "negative_prompt": self.negative_prompt,
            "patch_sizes": [list(p) for p in pyramid.patch_sizes] if pyramid.kind == "ppf" else None,
        }


def describe_model(document: Any, config: WanConfig, source: str) -> ModelDescription:
    """Read a `pyramid.json` document.

    Raises:
        UsageError: a field is missing, unknown or impossible; the message names it.
    """
    fields = Fields(document, source)
    fields.only((
        "format", "kind", "stages", "wavelet", "axes", "first_frame", "clean_levels", "resolution", "text_length",
        "schedules", "default_schedule", "negative_prompt", "patch_sizes",
    ))  # fmt: skip
    if fields.get("format", "a whole number", lambda v: type(v) is int) != FORMAT:
        raise fields.wrong("format", f"{FORMAT} (a later format needs a later pyrexport)")
    kind = fields.text("kind", choices=KINDS)
    depth = fields.integer("stages")
    if depth > 8 or (kind == "plain" and depth != 1):
        raise fields.wrong("stages", "1 for a plain model" if kind == "plain" else "at most 8")
    axes = fields.text("axes", "THW", choices=("T", "H", "W", "TH", "TW", "HW", "THW")) if kind == "pyramidal" else ""
    first = fields.text("first_frame", "separate", choices=("separate", "joint"))
    wavelet = fields.get("wavelet", "a name or a list of low-pass taps", lambda v: isinstance(v, str | list), "haar")
    nominal_gain = gain(len(axes) if kind == "pyramidal" else 3)
    clean_levels = fields.numbers("clean_levels", default_clean_levels(depth, nominal_gain))
    if len(clean_levels) != depth:
        raise fields.wrong("clean_levels", f"{depth} levels, finest stage first")
    size = fields.object("resolution")
    size.only(("frames", "height", "width"))
    resolution = Resolution(size.integer("frames"), size.integer("height"), size.integer("width"))
    try:
        pyramid = Pyramid(
            kind=kind,
            clean_levels=clean_levels,
            resolution=resolution,
            patch_sizes=_patch_sizes(fields, kind, depth, config),
            taps=wavelet_taps(wavelet),
            axes=axes,
            first_frame_apart=kind == "pyramidal" and first == "separate",
            channels=config.in_channels,
        )
        _check_rope(pyramid, config)
        schedules = _schedules(fields)
        for name, entry in schedules.items():
            entry.schedule(name, pyramid)
    except UsageError as error:
        text = str(error)
        raise error if text.startswith(source) else UsageError(f"{source}: {text}") from None
    default = fields.text("default_schedule", next(iter(schedules)), choices=schedules)
    return ModelDescription(
        pyramid,
        wavelet,
        fields.integer("text_length", 512),
        schedules,
        default,
        fields.text("negative_prompt", ""),
    )


def _check_rope(pyramid: Pyramid, config: WanConfig) -> None:
    longest = max(size for stage in pyramid.stages for size in stage.grid)
    if longest > config.rope_max_seq_len:
        raise UsageError(
            f"impossible resolution {pyramid.resolution}: the transformer's positions end at {config.rope_max_seq_len} "
            f"tokens along an axis (rope_max_seq_len), found {longest}"
        )


def _patch_sizes(fields: Fields, kind: str, depth: int, config: WanConfig) -> tuple[Patch, ...]:
    if kind != "ppf":
        if fields.document.get("patch_sizes") is not None:
            raise fields.wrong("patch_sizes", f"null for a {kind} model")
        return (config.patch_size,) * depth
    expected = f"a patch size [T, H, W] for each of {depth} stages, finest first"

    def valid(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == depth
            and all(
                isinstance(p, list) and len(p) == 3 and all(type(n) is int and 0 < n < 1024 for n in p) for p in value
            )
        )

    return tuple((p[0], p[1], p[2]) for p in fields.get("patch_sizes", expected, valid))


def _schedules(fields: Fields) -> dict[str, ScheduleEntry]:
    schedules = {}
    for name, value in fields.object("schedules").document.items():
        entry = Fields(value, f"{fields.source}: schedule '{name}'")
        entry.only(("steps", "levels", "shift", "guidance_scale"))
        guidance, shift = entry.number("guidance_scale", 1.0), entry.number("shift", 5.0)
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise entry.wrong("guidance_scale", f"a number from 0 to {MAX_GUIDANCE:g}")
        if {"levels", "steps"} <= entry.document.keys():
            raise UsageError(f"{entry.source}: expected steps or levels, found both")
        if "levels" in entry.document:
            levels = entry.get(
                "levels",
                "a list of natural levels per stage, coarsest first",
                lambda v: (
                    isinstance(v, list) and bool(v) and all(isinstance(g, list) and all(map(is_number, g)) for g in v)
                ),
            )
            schedules[name] = ScheduleEntry((), tuple(tuple(map(float, g)) for g in levels), shift, guidance)
        else:
            steps = entry.get(
                "steps",
                "steps per stage, coarsest first, from 1 to 9999 each",
                lambda v: isinstance(v, list) and bool(v) and all(type(n) is int and 0 < n < 10_000 for n in v),
            )
            schedules[name] = ScheduleEntry(tuple(steps), (), shift, guidance)
    if not schedules:
        raise fields.wrong("schedules", "at least one schedule")
    return schedules


def bare_model(config: WanConfig, resolution: Resolution) -> ModelDescription:
    """The model that a bare transformer configuration stands for: three stages, Haar, the paper's schedules."""
    size = {"frames": resolution.frames, "height": resolution.height, "width": resolution.width}
    document = {
        "format": FORMAT,
        "kind": "pyramidal",
        "stages": 3,
        "resolution": size,
        "schedules": PAPER_SCHEDULES,
        "default_schedule": "2-2-1",
    }
    return describe_model(document, config, "assumed model")


def plain_document(shift: float) -> dict[str, Any]:
    """The `pyramid.json` that a plain Wan model stands for, with the shift of its scheduler."""
    return {
        "format": FORMAT,
        "kind": "plain",
        "stages": 1,
        "resolution": vars(PLAIN_RESOLUTION),
        "schedules": {"50": {"steps": [50], "shift": shift, "guidance_scale": 5.0}, **PLAIN_SCHEDULES},
        "default_schedule": "50",
    }
