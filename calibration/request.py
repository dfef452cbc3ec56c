"""What is asked of a calibration, and the facts that its statistics depend on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from ..runtime.chain.schedules import Schedule
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.identity import checkpoint_digest, checkpoint_files
from ..runtime.quantisation import COMPONENTS
from ..runtime.trajectories import TEXTS, Trajectories
from .observe import frame_groups

__all__ = ["CalibrationRequest", "trajectories"]

PACKAGES = ("pyrexport", "torch", "diffusers", "transformers", "numpy")
"""Packages whose versions decide what a run gives."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What is to be run."""

    prompts: Sequence[str]
    """One run each; without a text encoder each is embedded as noise drawn from its position."""
    schedule: Schedule
    """Of the runs: statistics are those of its levels."""
    seed: int = 0
    """Of the first run; each further one has the next."""
    percentile: float = 100.0
    """Of magnitudes: what is beyond is cut."""
    methods: Mapping[str, str] = field(default_factory=lambda: {"transformer": "w8a8"})
    """That the recipe is for: by component, one of `METHODS` that a recipe can serve."""
    target_psnr: float | None = None
    """Keep layers of the transformer until videos reach this PSNR in dB; None: none is kept."""
    statistics: Path | None = None
    """A recipe of the same run, whose statistics are taken."""


def trajectories(checkpoint: Checkpoint, request: CalibrationRequest) -> Trajectories:
    """What is run; all files of the checkpoint are hashed."""
    model = checkpoint.model
    groups, _ = frame_groups(model.stages(checkpoint.resolution))
    return Trajectories(
        checkpoint=checkpoint_digest(checkpoint_files(checkpoint)),
        components=tuple(component for component in COMPONENTS if component in request.methods),
        kind=model.pyramid.kind.name,
        stages=model.pyramid.depth,
        groups=groups,
        resolution=checkpoint.resolution,
        schedule=request.schedule,
        prompts=len(request.prompts),
        prompts_sha256=hashlib.sha256("\n".join(request.prompts).encode()).hexdigest(),
        text=TEXTS[0 if checkpoint.text_encoder else 1],
        negative_prompt=model.negative_prompt,
        seed=request.seed,
        percentile=request.percentile,
        versions={name: version(name) for name in PACKAGES},
    )
