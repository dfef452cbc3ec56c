"""The `pyramid.json` of a checkpoint that is made of an author's files: what is given, found, and assumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.chain.kinds import KINDS
from ...runtime.chain.pyramid import Resolution
from ...runtime.chain.schedules import parse_levels, parse_steps
from ...runtime.documents import read_json
from ...runtime.errors import UsageError
from ...runtime.model.checkpoint import assumed_document, read_family
from .configs import Shapes
from .documents import pyramid_document
from .extras import FIRST_FRAME
from .presets import PRESETS, unipc

__all__ = ["Description", "describe", "index_fields", "parse_schedule", "scheduler_of"]

STAGES = 3
"""Of a pyramidal model that says nothing of them, as in the paper."""


INDEX_FIELDS = ("boundary_ratio", "expand_timesteps", "is_cfg_zero_star", "is_distilled")
"""Of `model_index.json`, beside the components: what sampling depends on."""

GUIDANCE = ("guidance_scale", "guidance_scale_2")
"""Fields of a schedule, in the order in which they are written."""

COMMON = ("shift", "solver", "guidance", "zeroed_steps", "amplify_first_chunk")
"""Fields of a schedule that one in its place has too."""

SHIFT = 5.0
"""Of a plain model's scheduler, where nothing says it: what Wan's own script samples with."""

SHIFT_OF_TWO, BOUNDARY = 12.0, 0.875
"""Of a model of two networks, likewise: Wan2.2-T2V-A14B's."""


@dataclass(frozen=True)
class Description:
    """What an author says of a model; None, and no schedules: nothing."""

    kind: str | None = None
    stages: int | None = None
    wavelet: str | None = None
    axes: str | None = None
    first_frame: str | None = None
    clean_levels: tuple[float, ...] | None = None
    """Finest stage first."""
    schedules: tuple[str, ...] = ()
    """As `parse_schedule` reads them; the first is the default."""
    shift: float | None = None
    resolution: Resolution | None = None
    negative_prompt: str | None = None


def parse_schedule(text: str, common: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and entry of a schedule: [NAME=]STEPS[:GUIDANCE[,GUIDANCE_2]], or levels in place of steps.

    Args:
        text: as it is written.
        common: fields of every schedule, of `COMMON`.

    Raises:
        UsageError: it is malformed.
    """
    name, equals, rest = text.rpartition("=")
    what, colon, guidance = rest.partition(":")
    try:
        scales = [float(scale) for scale in guidance.split(",")] if colon else [1.0]
        entry = {**common, **dict(zip(GUIDANCE[: len(scales)], scales, strict=True))}
    except ValueError:
        raise UsageError(f"a schedule has one or two guidance scales, found '{guidance}' in '{text}'") from None
    if steps := parse_steps(what):
        return name or what, entry | {"steps": list(steps)}
    if not equals:
        raise UsageError(f"a schedule is STEPS[:GUIDANCE] such as 2-2-1:1, or NAME=LEVELS[:GUIDANCE], found '{text}'")
    entry.pop("amplify_first_chunk", None)  # it is steps that are doubled
    return name, entry | {"levels": parse_levels(what)}


def describe(
    folder: Path, own: Path | None, given: Description, shapes: Shapes, text_length: int
) -> tuple[dict[str, Any], list[str]]:
    """The document, and what was assumed.

    Args:
        folder: the checkpoint, as far as it is written: its scheduler is read.
        own: the source's `pyramid.json`, where it has one.
        given: what takes the place of what is found.
        shapes: of the transformer's tensors, by which its kind is told.
        text_length: of the prompts' embeddings.

    Raises:
        UsageError: a schedule is malformed.
    """
    document, assumed = (read_json(own), []) if own is not None else _assumed(folder, given, shapes, text_length)
    document.pop("components", None)
    if given.stages not in (None, document.get("stages")) and not given.schedules:
        raise UsageError(f"schedules are of {document.get('stages')} stage(s): give --schedule for {given.stages} too")
    said: Mapping[str, Any] = {
        "kind": given.kind,
        "stages": given.stages,
        "wavelet": given.wavelet,
        "axes": given.axes,
        "first_frame": given.first_frame,
        "clean_levels": None if given.clean_levels is None else list(given.clean_levels),
        "resolution": None if given.resolution is None else vars(given.resolution),
        "negative_prompt": given.negative_prompt,
    }
    document |= {name: value for name, value in said.items() if value is not None}
    schedules = document.get("schedules", {})
    if given.schedules:
        first = schedules.get(document.get("default_schedule"), next(iter(schedules.values()), {}))
        common = {name: first[name] for name in COMMON if name in first}
        common |= {} if given.shift is None else {"shift": given.shift}
        document["schedules"] = dict(parse_schedule(text, common) for text in given.schedules)
        document["default_schedule"] = next(iter(document["schedules"]))
    elif given.shift is not None:
        for entry in schedules.values():
            entry["shift"] = given.shift
    return document, assumed


def _assumed(folder: Path, given: Description, shapes: Shapes, text_length: int) -> tuple[dict[str, Any], list[str]]:
    """A document for the kind that the tensors are of."""
    patches = _patches(shapes)
    has = (bool(patches), not patches and FIRST_FRAME in shapes)
    told = {name: facts for name, facts in KINDS.items() if not facts.clocked}  # a clock is in no tensor
    found = next(name for name, facts in told.items() if (facts.own_patch_layers, facts.first_frame_embedding) == has)
    kind, assumed = given.kind or found, list[str]()
    family, _ = read_family({name: folder / name for name in ("transformer", "vae")})
    own = family.described(folder)
    if own is not None:
        if given.kind not in (None, own["kind"]) or given.stages not in (None, own["stages"]):
            raise UsageError(f"kind and stages of {family.name} are its scheduler's: leave out --kind, --stages")
        document = assumed_document(folder, family) | {"text_length": text_length}
    elif KINDS[kind].most_stages == 1:
        document = assumed_document(folder, family) | {"text_length": text_length}
        if given.kind is None:
            assumed.append(
                f"kind {kind}: the transformer has neither a first frame's vector nor patch layers of stages"
            )
    else:
        stages = given.stages or len(patches) or STAGES
        document = pyramid_document(kind, stages, "haar", PRESETS["wan2.1-1.3b"].resolution, text_length)
        document = {name: value for name, value in document.items() if value is not None}
        document |= {"patch_sizes": patches} if patches else {}
        unsaid = {"stages": given.stages or len(patches) or None, "wavelet": given.wavelet, "axes": given.axes}
        unsaid |= {"first_frame": given.first_frame}
        assumed += [f"{name} {document[name]}" for name, value in unsaid.items() if value is None and name in document]
        assumed += [] if given.schedules else [f"schedules {', '.join(document['schedules'])}"]
    if given.resolution is None:
        assumed.append("resolution {frames}x{height}x{width}".format(**document["resolution"]))
    return document, assumed


def _patches(shapes: Shapes) -> list[list[int]]:
    """Patch sizes of the stages that have layers of their own, finest first."""
    found = list[list[int]]()
    while (name := f"patch_embedding.{len(found)}.weight") in shapes:
        found.append(list(shapes[name][2:]))
    return found


def scheduler_of(own: Path | None, shift: float | None, *, two: bool) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a scheduler, and what was assumed.

    Args:
        own: the source's.
        shift: of the one of Wan's own script, which takes its place where it has none.
        two: the model has two networks.
    """
    if own is not None:
        return read_json(own), []
    chosen = shift or (SHIFT_OF_TWO if two else SHIFT)
    return unipc(chosen), [f"scheduler UniPC, shift {chosen:g}"]


def index_fields(source: Path, folder: Path, boundary: float | None, *, two: bool) -> tuple[dict[str, Any], list[str]]:
    """Fields of `model_index.json` that are the source's, or those of Wan2.2, and what was assumed.

    Args:
        source: what a checkpoint is made of.
        folder: the checkpoint, with its components' configurations.
        boundary: where the second of two networks takes over, in place of the source's.
        two: the model has two networks.
    """
    file, vae = source / "model_index.json", folder / "vae" / "config.json"
    theirs = read_json(file) if file.is_file() else {}
    found = {name: theirs[name] for name in INDEX_FIELDS if theirs.get(name) is not None}
    if vae.is_file() and read_json(vae).get("is_residual"):
        found["expand_timesteps"] = True
    if boundary is not None:
        found["boundary_ratio"] = boundary
    if two and "boundary_ratio" not in found:
        return found | {"boundary_ratio": BOUNDARY}, [f"boundary_ratio {BOUNDARY}"]
    return found, []
