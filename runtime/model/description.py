"""A model as data: what `pyramid.json` says of it, and the configurations that go with that."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..chain.clock import Clock
from ..chain.kinds import KINDS, Kind
from ..chain.levels import default_clean_levels, gain
from ..chain.pyramid import Pyramid, Resolution, Stage
from ..chain.schedules import MAX_GUIDANCE, Schedule, parse_steps
from ..chain.solvers import SolverChoice
from ..chain.wavelets import wavelet_taps
from ..documents import Fields
from ..errors import UsageError
from .families import DecoderConfig, Family, TransformerConfig
from .preview import PreviewMap
from .schedules import ScheduleEntry, parse_schedules, plain_schedules

__all__ = ["FORMAT", "Model", "bare_model", "parse_model", "parse_resolution", "plain_document"]

FORMAT = 1


@dataclass(frozen=True)
class Model:
    """What a model is made of and how it is sampled. It has no size: see `stages`."""

    family: Family
    transformer: TransformerConfig
    pyramid: Pyramid
    wavelet: str | list[float]
    text_length: int
    schedules: Mapping[str, ScheduleEntry]
    default_schedule: str
    negative_prompt: str
    preview: PreviewMap | None = None
    """The map of previews that `pyramid.json` gives, in place of one that is fitted to the VAE."""
    decoders: Mapping[str, DecoderConfig] = field(default_factory=dict)
    """Configurations of what decodes its latents, by component, in the order of `DECODERS`."""

    def stages(self, resolution: Resolution) -> tuple[Stage, ...]:
        """The stages at a resolution, finest first.

        Raises:
            UsageError: the resolution does not fit the stages, or the transformer's positions end before it does.
        """
        stages = self.pyramid.stages(resolution)
        longest, most = max(size for stage in stages for size in stage.grid), self.transformer.longest_axis
        if longest > most:
            raise UsageError(
                f"impossible resolution {resolution}: the transformer's positions end at {most} "
                f"tokens along an axis (rope_max_seq_len), found {longest}"
            )
        return stages

    def schedule(
        self,
        name: str | Schedule | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        *,
        levels: list[list[float]] | None = None,
        solver: str | None = None,
    ) -> Schedule:
        """The schedule to sample with.

        Args:
            name: a schedule of the model, or steps such as "10-10-10", which are spaced with the default
                schedule's shift, guidance and solver; the default schedule if None.
            guidance_scale: replaces the schedule's own, and that of a second network too.
            guidance_scale_2: of the second network alone.
            levels: explicit natural levels per stage, coarsest first, in place of a named schedule.
            solver: replaces the schedule's own.

        Raises:
            UsageError: the name is unknown, or steps or levels do not fit the stages.
        """
        for scale in (guidance_scale, guidance_scale_2):
            if scale is not None and not 0 <= scale <= MAX_GUIDANCE:
                raise UsageError(
                    f"a guidance scale lies within 0 … {MAX_GUIDANCE:g} (1 and below: no guidance), found {scale:g}"
                )
        if guidance_scale_2 is not None and self.experts == 1:
            raise UsageError("a second guidance scale is of a model of two networks, which this one is not")
        if isinstance(name, Schedule):
            schedule = name
        else:
            label, entry = self._entry(name, levels)
            if solver is not None:
                entry = replace(entry, solver=SolverChoice.of(solver))
            schedule = entry.schedule(label, self.pyramid)
        if guidance_scale is not None:
            schedule = replace(schedule, guidance_scale=guidance_scale, guidance_scale_2=None)
        return schedule if guidance_scale_2 is None else replace(schedule, guidance_scale_2=guidance_scale_2)

    @property
    def telling_chunks(self) -> int:
        """Chunks of a run that shows all that the model does: two, one with a history, where there are histories."""
        return 1 if self.family.history is None else 2

    @property
    def experts(self) -> int:
        """Networks that the transformer consists of, each for a range of noise levels."""
        return 1 if self.pyramid.boundary is None else 2

    def _entry(self, name: str | None, levels: list[list[float]] | None) -> tuple[str, ScheduleEntry]:
        default = self.schedules[self.default_schedule]
        if levels is not None:
            if name is not None:
                raise UsageError("give a schedule by name or by levels, not both")
            return "levels", replace(default, steps=(), levels=tuple(map(tuple, levels)), amplified=False)
        label = self.default_schedule if name is None else name
        if label in self.schedules:
            return label, self.schedules[label]
        if steps := parse_steps(label):
            return label, replace(default, steps=steps, levels=())
        raise UsageError(
            f"unknown schedule '{label}': expected one of {', '.join(self.schedules)}, or steps per stage such as 2-2-1"
        )

    def to_json(self) -> dict[str, Any]:
        """The document that `parse_model` reads: `pyramid.json` without its resolution."""
        pyramid = self.pyramid
        optional = {} if self.preview is None else {"preview_rgb": self.preview.to_json()["rgb"]}
        optional |= {} if pyramid.boundary is None else {"boundary_ratio": pyramid.boundary}
        optional |= {} if pyramid.clock is None else {"clock": pyramid.clock.to_json()}
        return optional | {
            "format": FORMAT,
            "kind": pyramid.kind.name,
            "stages": pyramid.depth,
            "wavelet": self.wavelet,
            "axes": pyramid.axes or "THW",
            "first_frame": "separate" if pyramid.first_frame_apart else "joint",
            "clean_levels": list(pyramid.clean_levels),
            "text_length": self.text_length,
            "schedules": {name: entry.to_json() for name, entry in self.schedules.items()},
            "default_schedule": self.default_schedule,
            "negative_prompt": self.negative_prompt,
            "patch_sizes": [list(p) for p in pyramid.patch_sizes] if pyramid.kind.own_patch_layers else None,
        }


FIELDS = (
    "format",
    "kind",
    "stages",
    "wavelet",
    "axes",
    "first_frame",
    "clean_levels",
    "text_length",
    "schedules",
    "default_schedule",
    "negative_prompt",
    "patch_sizes",
    "preview_rgb",
    "boundary_ratio",
    "clock",
)


def parse_model(document: Any, family: Family, config: TransformerConfig, source: str) -> Model:
    """Read a `pyramid.json` document, its resolution left out.

    Raises:
        UsageError: a field is missing, unknown or impossible; the message names it.
    """
    fields = Fields(document, source)
    fields.only(FIELDS)
    if fields.get("format", "a whole number", lambda v: type(v) is int) != FORMAT:
        raise fields.wrong("format", f"{FORMAT} (a later format needs a later pyrexport)")
    wavelet = fields.get("wavelet", "a name or a list of low-pass taps", lambda v: isinstance(v, str | list), "haar")
    try:
        pyramid = _parse_pyramid(fields, wavelet, family, config)
        schedules = parse_schedules(fields)
        for name, entry in schedules.items():
            entry.schedule(name, pyramid)
    except UsageError as error:
        text = str(error)
        raise error if text.startswith(source) else UsageError(f"{source}: {text}") from None
    return Model(
        family,
        config,
        pyramid,
        wavelet,
        fields.integer("text_length", 512),
        schedules,
        fields.text("default_schedule", next(iter(schedules)), choices=schedules),
        fields.text("negative_prompt", ""),
        preview=_preview(fields, pyramid),
    )


def _preview(fields: Fields, pyramid: Pyramid) -> PreviewMap | None:
    rgb = fields.document.get("preview_rgb")
    return None if rgb is None else PreviewMap.from_json({"rgb": rgb}, pyramid.geometry.channels, fields.source)


def _parse_pyramid(fields: Fields, wavelet: str | list[float], family: Family, config: TransformerConfig) -> Pyramid:
    kinds = [name for name, kind in KINDS.items() if kind.clocked or not family.clocked]
    kind = KINDS[fields.text("kind", choices=kinds)]
    depth = fields.integer("stages")
    if depth > kind.most_stages:
        most = "1" if kind.most_stages == 1 else f"at most {kind.most_stages}"
        raise fields.wrong("stages", f"{most} for a {kind.name} model")
    axes = fields.text("axes", "THW", choices=("T", "H", "W", "TH", "TW", "HW", "THW")) if kind.halves else ""
    apart = "joint" if kind.clocked else "separate"
    first = fields.text("first_frame", apart, choices=("separate", "joint"))
    nominal_gain = gain(len(axes) if kind.schedule_axes is None else kind.schedule_axes)
    clean_levels = fields.numbers("clean_levels", default_clean_levels(depth, nominal_gain))
    if len(clean_levels) != depth:
        raise fields.wrong("clean_levels", f"{depth} levels, finest stage first")
    return Pyramid(
        kind=kind,
        clean_levels=clean_levels,
        patch_sizes=_patch_sizes(fields, kind, depth, config),
        taps=wavelet_taps(wavelet),
        axes=axes,
        first_frame_apart=kind.halves and first == "separate",
        geometry=family.geometry(config),
        boundary=_boundary(fields),
        clock=_clock(fields, depth),
    )


def _clock(fields: Fields, depth: int) -> Clock | None:
    document = fields.document.get("clock")
    return None if document is None else Clock.from_json(document, depth, f"{fields.source}: clock")


def _boundary(fields: Fields) -> float | None:
    if fields.document.get("boundary_ratio") is None:
        return None
    found = fields.number("boundary_ratio")
    if not 0 < found < 1:
        raise fields.wrong("boundary_ratio", "a number above 0 and below 1")
    return found


def _patch_sizes(fields: Fields, kind: Kind, depth: int, config: TransformerConfig) -> tuple[tuple[int, int, int], ...]:
    if not kind.own_patch_layers:
        if fields.document.get("patch_sizes") is not None:
            raise fields.wrong("patch_sizes", f"null for a {kind.name} model")
        return (config.patch_size,) * depth

    def is_patch(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(type(n) is int and 0 < n < 1024 for n in value)

    patches = fields.get(
        "patch_sizes",
        f"a patch size [T, H, W] for each of {depth} stages, finest first",
        lambda value: isinstance(value, list) and len(value) == depth and all(map(is_patch, value)),
    )
    return tuple((p[0], p[1], p[2]) for p in patches)


def parse_resolution(fields: Fields) -> Resolution:
    """The field `resolution` of a document.

    Raises:
        UsageError: it is missing or malformed.
    """
    size = fields.object("resolution")
    size.only(("frames", "height", "width"))
    return Resolution(size.integer("frames"), size.integer("height"), size.integer("width"))


def bare_model(family: Family, config: TransformerConfig) -> Model:
    """The model that a bare transformer configuration stands for: see `Family.assumed`."""
    _, document = family.assumed
    return parse_model({"format": FORMAT, **document}, family, config, "assumed model")


def plain_document(
    shift: float, solver: SolverChoice, resolution: Resolution, boundary: float | None = None
) -> dict[str, Any]:
    """The `pyramid.json` that a plain Wan model stands for.

    Args:
        shift: of its scheduler.
        solver: that its scheduler stands for.
        resolution: what it is sampled at.
        boundary: where the second of its networks takes over, of a model of two.
    """
    schedules = plain_schedules(shift, solver, experts=1 if boundary is None else 2)
    return {
        "format": FORMAT,
        "kind": "plain",
        "stages": 1,
        "resolution": vars(resolution),
        "schedules": schedules,
        "default_schedule": next(iter(schedules)),
        **({} if boundary is None else {"boundary_ratio": boundary}),
    }
