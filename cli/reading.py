"""Opening a checkpoint: the options that say which weights are read, and what is merged into them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint, Files, read_checkpoint
from ..runtime.model.identity import LORA, lora_files
from ..runtime.model.safetensors import read_header
from .common import PATH, ResolutionType

__all__ = [
    "Reading",
    "Weights",
    "reading_options",
    "require_same_loras",
    "resolution_option",
    "resolve_checkpoint",
    "weights_options",
]

FLAGS = {"tiny_decoder": "vae_decoder"}
"""Options that are not called as the component whose file they name."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Weights:
    """Which weights of a checkpoint are read, and what is merged into them."""

    files: Files = field(default_factory=Files)
    loras: tuple[str, ...] = ()
    """As FILE[:SCALE]."""

    def refuse_for_bundle(self, bundle: Path) -> None:
        """Refuse what a bundle was built with, and keeps.

        Raises:
            UsageError: a value is given.
        """
        flags = {FLAGS.get(name, name): value for name, value in vars(self.files).items() if value is not None}
        flags |= {"lora": self.loras} if self.loras else {}
        for name in flags:
            flag = name.replace("_", "-")
            raise UsageError(f"{bundle} is a bundle, whose weights are fixed: give --{flag} to build one")

    def absolute(self) -> "Weights":
        """The same files, as processes find them that start in other folders.

        Raises:
            UsageError: a LoRA is not there.
        """
        given: dict[str, Any] = vars(self.files)
        given = {name: value.absolute() if isinstance(value, Path) else value for name, value in given.items()}
        files = Files(**given)
        if not self.loras:
            return Weights(files)
        from ..export.weights.lora import parse_lora

        loras = (parse_lora(text) for text in self.loras)
        return Weights(files, tuple(f"{lora.component}={lora.file.absolute()}:{lora.scale}" for lora in loras))


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is read."""

    resolution: Resolution | None = None
    """In place of the checkpoint's own."""
    weights: Weights = field(default_factory=Weights)


def weights_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--variant`, `--transformer`, `--text-encoder`, `--vae` and `--lora`, as one argument `weights`."""

    @wraps(command)
    def wrapped(
        *arguments: Any,
        variant: str | None,
        transformer: Path | None,
        transformer_2: Path | None,
        text_encoder: Path | None,
        vae: Path | None,
        tiny_decoder: Path | None,
        loras: tuple[str, ...],
        **others: Any,
    ) -> Any:
        weights = Weights(Files(variant, transformer, transformer_2, text_encoder, vae, tiny_decoder), loras)
        return command(*arguments, weights=weights, **others)

    decorated: Callable[..., Any] = wrapped
    for option in (
        click.option(
            "--lora",
            "loras",
            multiple=True,
            metavar="[COMPONENT=]FILE[:SCALE]",
            help="Merge a LoRA into a checkpoint's transformer (or transformer_2); can be given again.",
        ),
        *(
            click.option(
                f"--{part}", type=PATH, help=f"A file in place of a checkpoint's {part}: safetensors, or .pth."
            )
            for part in ("vae", "text-encoder", "transformer-2", "transformer")
        ),
        click.option(
            "--vae-decoder",
            "tiny_decoder",
            type=PATH,
            help="A tiny decoder beside a checkpoint's VAE, or without one: taew2_1.safetensors or .pth.",
        ),
        click.option("--variant", help="Of a checkpoint's files: fp16 reads STEM.fp16.safetensors."),
    ):
        decorated = option(decorated)
    return decorated


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option `--resolution` and those of `weights_options`, as one argument `reading`."""

    @wraps(command)
    def wrapped(*arguments: Any, resolution: Resolution | None, weights: Weights, **others: Any) -> Any:
        return command(*arguments, reading=Reading(resolution, weights), **others)

    return resolution_option(weights_options(wrapped))


def resolution_option(command: F) -> F:
    """The option `--resolution`, of one."""
    return click.option(
        "--resolution", type=ResolutionType(), help="Of a checkpoint, in place of its own; of a bundle, one of its own."
    )(command)


def resolve_checkpoint(folder: Path, resolution: Resolution | None = None, weights: Weights = Weights()) -> Checkpoint:
    """Read a checkpoint; diffusers is imported only if the tensors carry Wan's original names."""
    from ..export.weights.names import to_diffusers

    header = read_header
    if any(isinstance(file, Path) for file in vars(weights.files).values()):
        from ..export.weights.pickled import read_any_header as header
    found = read_checkpoint(folder, resolution=resolution, rename=to_diffusers, files=weights.files, header=header)
    for name in found.model.family.unread:
        if (folder / name).exists():
            click.echo(f"Note: {folder / name} is no part of sampling, and is not read", err=True)
    if not weights.loras:
        return found
    from ..export.weights.lora import merge_loras, parse_lora

    return merge_loras(found, [parse_lora(text) for text in weights.loras])


def require_same_loras(bundle: Path, provenance: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to compare a bundle with a checkpoint that has other LoRAs in it.

    Args:
        bundle: its folder.
        provenance: what its manifest says that it was made of.
        checkpoint: the reference.

    Raises:
        UsageError: they differ, in their files' contents or in their scales.
    """
    written = provenance.get("checkpoint", {}).get("files", {})
    merged, given = (
        sorted((name.rpartition(":")[2], sha, name) for name, sha in files.items() if name.startswith(f"{LORA}/"))
        for files in (written, lora_files(checkpoint))
    )
    if [lora[:2] for lora in merged] != [lora[:2] for lora in given]:
        ours, theirs = (
            ", ".join(name.removeprefix(f"{LORA}/") for *_, name in loras) or "none" for loras in (merged, given)
        )
        raise UsageError(
            f"{bundle} was built with other LoRAs than the reference: expected --lora {ours}, found {theirs}"
        )
