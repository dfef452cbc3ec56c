"""What a calibration ran: the facts that its statistics depend on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .chain.pyramid import Resolution
from .chain.schedules import Schedule
from .documents import Fields
from .model.schedules import ScheduleEntry
from .quantisation import COMPONENTS

__all__ = ["FORMAT", "PASSES", "TEXTS", "Trajectories"]

FORMAT = 3
PASSES = ("conditional", "unconditional")
"""Evaluations of a guided step."""

TEXTS = ("encoder", "noise")
"""Where embeddings of prompts come from."""


@dataclass(frozen=True)
class Trajectories:
    """What was run: all that statistics depend on."""

    checkpoint: str
    """SHA-256 of the checkpoint's files, as bundles record it."""
    components: tuple[str, ...]
    """Whose layers were watched."""
    kind: str
    stages: int
    groups: tuple[str, ...]
    """Frame groups that are told apart."""
    resolution: Resolution
    schedule: Schedule
    """Its levels are those at which the statistics were seen."""
    prompts: int
    prompts_sha256: str
    """Of the prompts, a line each."""
    text: str
    """Where embeddings came from: `encoder`, or `noise` where the checkpoint has no text encoder."""
    negative_prompt: str
    seed: int
    """Of the first prompt; each further one has the next."""
    percentile: float
    versions: Mapping[str, str]
    """Of the packages that ran it."""

    @property
    def passes(self) -> tuple[str, ...]:
        """Evaluations of each step."""
        return PASSES if self.schedule.guided else PASSES[:1]

    def differing(self, document: Mapping[str, Any]) -> list[str]:
        """The fields that differ in the document of another run."""
        ours = self.to_json()
        return [name for name in ours if document.get(name) != ours[name]]

    @classmethod
    def from_json(cls, document: Any, source: str) -> "Trajectories":
        """Read a recipe's description.

        Raises:
            UsageError: a field is missing or impossible.
        """
        found = Fields(document, source)
        if found.integer("format") != FORMAT:
            raise found.wrong("format", f"{FORMAT} (another format needs another version of pyrexport)")
        entry = ScheduleEntry.from_json(found.document.get("schedule"), f"{source}: schedule")
        versions = found.object("versions")
        return cls(
            checkpoint=found.text("checkpoint"),
            components=tuple(found.get("components", f"names of {', '.join(COMPONENTS)}", _are_components)),
            kind=found.text("kind"),
            stages=found.integer("stages"),
            groups=tuple(found.get("groups", "a list of names", _are_names)),
            resolution=Resolution.parse(found.text("resolution")),
            schedule=Schedule(
                found.text("schedule_name"),
                entry.levels,
                entry.guidance_scale,
                entry.solver,
                entry.scaled_start,
                entry.guidance_scale_2,
                entry.guidance,
            ),
            prompts=found.integer("prompts"),
            prompts_sha256=found.text("prompts_sha256"),
            text=found.text("text", choices=TEXTS),
            negative_prompt=found.text("negative_prompt"),
            seed=found.integer("seed", least=0),
            percentile=found.number("percentile"),
            versions={name: versions.text(name) for name in versions.document},
        )

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        chosen = self.schedule
        entry = ScheduleEntry(
            levels=chosen.levels,
            guidance_scale=chosen.guidance_scale,
            solver=chosen.solver,
            scaled_start=chosen.scaled_start,
            guidance_scale_2=chosen.guidance_scale_2,
            guidance=chosen.guidance,
        )
        values = {
            **vars(self),
            "components": list(self.components),
            "groups": list(self.groups),
            "resolution": str(self.resolution),
            "schedule": entry.to_json(),
        }
        return {"format": FORMAT, **values, "schedule_name": chosen.name, "versions": dict(self.versions)}


def _are_components(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(name in COMPONENTS for name in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
