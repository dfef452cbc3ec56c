"""What was compared, on what: the facts that a report's figures belong to."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ... import __version__
from ...runtime.bundle.engines import EngineOptions, find_target
from ...runtime.bundle.manifest import Manifest
from ...runtime.chain.plan import StepPlan, plan
from ...runtime.proof.trace import Run
from ...runtime.quantisation import COMPONENTS
from .page import section, tag

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A bundle, the reference that it was compared with, and how its graphs were run."""

    bundle: Path
    manifest: Manifest
    reference: str
    """Where the reference came from: a checkpoint, or traces."""
    runs: tuple[Run, ...]
    """Those that were sampled again, in order."""
    engine: EngineOptions

    @property
    def title(self) -> str:
        """The bundle in a line."""
        size, target = self.manifest.resolution, self.manifest.target
        return f"{self.bundle.name} ({target}, {self.stored}) at {size} against {self.reference}"

    @property
    def stored(self) -> str:
        """What its components are stored in, where the transformer's scheme does not say it for all."""
        schemes = {component: self.manifest.scheme(component).name for component in COMPONENTS}
        if len(set(schemes.values())) == 1:
            return schemes["transformer"]
        return ", ".join(f"{component} {scheme}" for component, scheme in schemes.items())

    def steps(self, run: int) -> tuple[StepPlan, ...]:
        """What is known of a run's steps."""
        return plan(self.manifest.model.pyramid, self.manifest.resolution, self.runs[run].schedule)

    def name(self, run: int) -> str:
        """A run in a line."""
        found = self.runs[run]
        return f"run {run + 1}: {found.prompt}, seed {found.seed}, schedule {found.schedule.name}"

    def machine(self) -> Element:
        """The section on the machine, the versions, and the origin of the bundle."""
        manifest = self.manifest
        checkpoint = manifest.provenance.get("checkpoint", {})
        engine = {**self.engine.own, "threads": self.engine.threads or "the engine's choice"}
        facts = {
            "machine": platform.platform(),
            "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "ran with": f"Python {platform.python_version()}, pyrexport {__version__}, NumPy {np.__version__}",
            "engine": f"{manifest.engine} {_installed(manifest.engine)}; built for {manifest.engine_version}",
            "options": _listed(engine),
            "remark": find_target(manifest.target).remark(),
            "bundle": str(self.bundle),
            "built with": _listed(manifest.provenance.get("packages", {})),
            "target options": _listed(manifest.target_options),
            "checkpoint": f"SHA-256 {checkpoint.get('sha256', 'unknown')}",
            "reference": self.reference,
        }
        found = [(name, str(value)) for name, value in facts.items() if value]
        pairs = [tag(kind, text) for pair in found for kind, text in zip(("dt", "dd"), pair, strict=True)]
        return section("Machine and versions", tag("dl", *pairs))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed here"


def _listed(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
