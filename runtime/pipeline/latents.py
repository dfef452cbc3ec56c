"""Latents on disk: an array that anybody reads, and beside it, in NAME.npy.json, what they were sampled with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.entries import is_digest
from ..bundle.manifest import Manifest
from ..chain.pyramid import Resolution
from ..chain.sampler import floats
from ..documents import Fields, read_json
from ..errors import CheckFailed, UsageError
from ..files import refuse_pointer, write_whole
from ..model.description import Model
from .chunks import split
from .video import save_array

__all__ = [
    "Origin",
    "checkpoint_of",
    "origin_file",
    "read_latents",
    "read_left_latents",
    "read_origin",
    "remove_latents",
    "save_latents",
]

FORMAT = 1
_MAGIC = b"\x93NUMPY"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """What latents were sampled with."""

    checkpoint: str | None
    """SHA-256 of the model's weights as they were before a build: see `checkpoint_of`. None where it is not known."""
    resolution: Resolution
    run: Mapping[str, Any]
    """Prompt, seed, schedule and so on: what tells the run from others, as JSON has it."""

    @classmethod
    def from_json(cls, document: Any, source: str) -> "Origin":
        """Read the file beside the latents.

        Raises:
            UsageError: it is malformed.
        """
        fields = Fields(document, source)
        fields.only(("format", "checkpoint", "resolution", "run"))
        if fields.integer("format") != FORMAT:
            raise fields.wrong("format", f"{FORMAT}")
        checkpoint = fields.get("checkpoint", "64 hexadecimal digits or null", lambda v: v is None or is_digest(v))
        try:
            resolution = Resolution.parse(fields.text("resolution"))
        except UsageError as error:
            raise UsageError(f"{source}: {error}".replace(f"{source}: {source}", source)) from None
        return cls(checkpoint, resolution, fields.object("run").document)

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {
            "format": FORMAT,
            "checkpoint": self.checkpoint,
            "resolution": str(self.resolution),
            "run": dict(self.run),
        }


def checkpoint_of(manifest: Manifest) -> str | None:
    """SHA-256 of the files that a bundle's weights come from, whatever it stores them in; None where it is not told."""
    found = manifest.provenance.get("checkpoint")
    digest = found.get("sha256") if isinstance(found, dict) else None
    return digest if is_digest(digest) else None


def origin_file(latents: Path) -> Path:
    """Where it is written what latents were sampled with."""
    return latents.with_name(f"{latents.name}.json")


def save_latents(path: Path, latents: Array, origin: Origin) -> None:
    """Write latents [C, T, H, W] as .npy, and their origin beside them; never beside the origin of others."""
    origin_file(path).unlink(missing_ok=True)
    save_array(path, latents)
    write_whole(origin_file(path), json.dumps(origin.to_json(), indent=1).encode())


def remove_latents(path: Path) -> None:
    """Remove latents and their origin, where they are."""
    for file in (path, origin_file(path)):
        file.unlink(missing_ok=True)


def read_origin(path: Path) -> Origin | None:
    """What latents were sampled with; None where nothing is beside them.

    Raises:
        UsageError: what is there is malformed.
    """
    file = origin_file(path)
    return Origin.from_json(read_json(file), str(file)) if file.exists() else None


def read_latents(path: Path, manifest: Manifest) -> Array:
    """Latents [C, T, H, W] that a bundle can decode.

    Raises:
        UsageError: there are none, or they are of another shape or of another model.
        CheckFailed: they are not finite.
    """
    values = _mapped(path)
    _check_origin(path, read_origin(path), manifest)
    others = [f"{list(manifest.at(size).stages[0].latent)} at {size}" for size in manifest.resolutions]
    known = manifest.resolution if len(others) == 1 else f"{manifest.resolution} (the bundle takes {', '.join(others)})"
    return _checked(values, manifest.model, manifest.resolution, f"{path}: latents [C, T, H, W] at {known}")


def read_left_latents(path: Path, model: Model, resolution: Resolution, chunks: int) -> Array:
    """Latents [C, T, H, W] that a run of a model left, which was stopped: of some of its chunks, or of all.

    Raises:
        UsageError: there are none, or they are of another shape, or of more chunks.
        CheckFailed: they are not finite.
    """
    found = _checked(_mapped(path), model, resolution, f"{path}: latents [C, T, H, W] at {resolution}")
    made = len(split(found, model, resolution))
    if made > chunks:
        raise UsageError(f"{path}: expected latents of at most {chunks} chunks, found those of {made}")
    return found


def _mapped(path: Path) -> NDArray[Any]:
    """The array of a .npy file, of which nothing is read yet.

    Raises:
        UsageError: there is none.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                refuse_pointer(path)
                raise UsageError(f"{path}: expected latents as .npy, found another kind of file")
        values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: expected latents as .npy, as sample --save-latents writes them") from None
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError) as error:
        raise UsageError(f"{path} is malformed: expected latents as .npy, found {error}") from None
    return values


def _checked(values: NDArray[Any], model: Model, resolution: Resolution, what: str) -> Array:
    """Finite latents of a video, of any number of chunks where it is made in some."""
    channels, frames, *size = model.stages(resolution)[0].latent
    if model.family.history is not None and values.ndim == 4:
        frames *= max(1, values.shape[1] // frames)
    latents = floats(values, (channels, frames, *size), what)
    if not np.isfinite(latents).all():
        raise CheckFailed(f"{what}: they are not finite: what sampled them failed, or the file is damaged")
    return latents


def _check_origin(path: Path, origin: Origin | None, manifest: Manifest) -> None:
    if origin is None:
        return
    all_the_same = f"decode with the bundle that they are of, or remove {origin_file(path)} to decode them all the same"
    if origin.resolution != manifest.resolution:
        raise UsageError(
            f"{path}: expected latents at {manifest.resolution}, found {origin.resolution}; {all_the_same}"
        )
    ours, theirs = checkpoint_of(manifest), origin.checkpoint
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(
            f"{path}: expected latents of the bundle's model ({ours[:16]}…), found those of another ({theirs[:16]}…); "
            f"{all_the_same}"
        )
