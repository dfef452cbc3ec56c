"""Checkpoints and options as a build in Python takes them."""

from pathlib import Path
from typing import Any

from pyrexport.export.bundle.options import BuildOptions, BuildRequest, resolve_options
from pyrexport.export.weights.names import to_diffusers
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.targets.facts import BuildTarget
from support.builders import SMALL

LEAN = ("--no-text-encoder", "--no-vae")
"""For `make_checkpoint`: a transformer alone."""
ONE_STAGE = ("--stages", "1", "--blocks", "1", "--no-vae")
"""A transformer of one stage and one block, and a text encoder: a graph of each."""


def small_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint at the resolution of the tests' bundles."""
    return read_checkpoint(folder, resolution=SMALL, rename=to_diffusers)


def build_options(
    checkpoint: Checkpoint, target: BuildTarget, precision: str = "fp32", **target_options: Any
) -> BuildOptions:
    """What is built where nothing else is asked for."""
    return resolve_options(checkpoint, target, BuildRequest(precision, target=target_options))
