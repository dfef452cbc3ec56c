"""Traces: a recorded reference run, in one safetensors file that is read without PyTorch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chain.schedules import Schedule
from ..chain.solvers import SolverChoice
from ..documents import Fields, is_number
from ..dtypes import DTYPES
from ..errors import UsageError
from ..model.safetensors import read_header, read_metadata
from ..model.schedules import read_guidance, read_guidance_kind, schedule_json
from ..quantisation import DECODERS

__all__ = ["FORMAT", "Frames", "Probe", "Run", "Trace", "Watch", "unwatched"]

FORMAT = 3

Frames = NDArray[np.uint8]
"""[n, H, W, 3]."""

Watch = Callable[[int, int, Frames, Frames], None]
"""Told of videos while they are compared: number of the run, number of the first of the frames, these frames of the
bundle, and all those of the reference."""


def unwatched(run: int, start: int, found: Frames, reference: Frames) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Probe:
    """One evaluation of a stage on noise."""

    stage: int
    level: float

    @classmethod
    def from_json(cls, document: Any, source: str) -> "Probe":
        """Read an entry of a trace's `probes`."""
        fields = Fields(document, source)
        return cls(fields.integer("stage", least=0), fields.number("level"))

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return vars(self)


@dataclass(frozen=True)
class Run:
    """One recorded sample."""

    prompt: str
    seed: int
    schedule: Schedule
    decoded: bool
    """Its frames are there too."""
    chunks: int = 1

    @property
    def steps(self) -> int:
        """Steps of all its chunks."""
        return sum(len(levels) for chunk in range(self.chunks) for levels in self.schedule.levels_of(chunk))

    @classmethod
    def from_json(cls, document: Any, source: str) -> "Run":
        """Read an entry of a trace's `runs`."""
        fields = Fields(document, source)
        fields.number("guidance_scale")
        guidance_scale, second = read_guidance(fields)
        schedule = Schedule(
            fields.text("schedule"),
            read_levels(fields, "levels"),
            guidance_scale,
            SolverChoice.from_json(fields.document.get("solver"), source),
            fields.get("scaled_start", "true or false", lambda v: isinstance(v, bool)),
            second,
            read_guidance_kind(fields),
            read_levels(fields, "first_chunk") if "first_chunk" in fields.document else (),
        )
        decoded = fields.get("decoded", "true or false", lambda v: isinstance(v, bool))
        chunks = fields.integer("chunks", 1)
        return cls(fields.text("prompt"), fields.integer("seed", least=0), schedule, decoded, chunks)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "schedule": self.schedule.name,
            "decoded": self.decoded,
            "chunks": self.chunks,
            **schedule_json(self.schedule),
        }


def read_levels(fields: Fields, name: str) -> tuple[tuple[float, ...], ...]:
    """Levels of each stage, coarsest first."""
    levels = fields.get(
        name,
        "a list of natural levels per stage",
        lambda v: isinstance(v, list) and all(isinstance(g, list) and all(map(is_number, g)) for g in v),
    )
    return tuple(tuple(map(float, group)) for group in levels)


class Trace:
    """A trace file; its tensors are read when they are asked for.

    Tensors: `text.R`, `text.negative` and `text.probe.K` (prompts of every length that has a graph) [L, D];
    `probe.K.latent`, `probe.K.velocity`, and `probe.history` where chunks have one; and per step, counted over all
    chunks, `run.R.step.K.before`, `.velocity` (after guidance) and `.after`, all [C, T, H, W]; of each decoder
    `vae.latent`, `vae.frames` [n, 3, H, W]; `run.R.frames` [T, H, W, 3], uint8.
    """

    def __init__(self, path: Path) -> None:
        """Read a trace's header.

        Raises:
            UsageError: the file is missing, damaged, or not a trace.
        """
        if not path.is_file():
            raise UsageError(f"{path} does not exist: expected a trace; record one with parity --record")
        self.path = path
        self.entries = read_header(path)
        text = read_metadata(path).get("trace")
        if text is None:
            raise UsageError(f"{path} is not a trace: record one with parity --record")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} has a malformed description ({error}); record it again") from None
        fields = Fields(document, str(path))
        if fields.integer("format") != FORMAT:
            raise fields.wrong("format", f"{FORMAT} (another format needs another version of pyrexport)")
        self.model: dict[str, Any] = dict(fields.object("model").document)
        self.negative_prompt = fields.text("negative_prompt")
        self.decoder: str | None = fields.get(
            "decoder", "a component that decodes, or null", lambda v: v is None or v in DECODERS.values()
        )
        self.texts: list[str] = fields.get(
            "texts", "a list of strings", lambda v: isinstance(v, list) and all(isinstance(text, str) for text in v)
        )
        self.probes = [Probe.from_json(item, f"{path}: probe") for item in self._list(fields, "probes")]
        self.runs = [Run.from_json(item, f"{path}: run") for item in self._list(fields, "runs")]

    @staticmethod
    def _list(fields: Fields, name: str) -> list[Any]:
        value: list[Any] = fields.get(name, "a list", lambda v: isinstance(v, list))
        return value

    def __contains__(self, name: str) -> bool:
        """Whether the trace has a tensor."""
        return name in self.entries

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor's values.

        Raises:
            UsageError: the trace does not have it.
        """
        if name not in self.entries:
            raise UsageError(f"{self.path} has no tensor '{name}'; record it again")
        entry = self.entries[name]
        if entry.dtype not in ("float32", "uint8"):
            found = DTYPES[entry.dtype].safetensors
            raise UsageError(f"{self.path}: tensor '{name}': expected F32 or U8, found {found}")
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            values = np.fromfile(file, entry.dtype, entry.elements)
        return values.reshape(entry.shape)
