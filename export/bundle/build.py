"""From a checkpoint to a bundle: graphs, one weights file, a manifest; written beside and renamed into place."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.manifest import MANIFEST_FILE
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import CheckFailed
from ...runtime.files import write_whole
from ...runtime.model.checkpoint import Checkpoint, Files, read_checkpoint
from ...runtime.reporter import Reporter
from ...targets.facts import DEFAULT_TARGET, BuildTarget, find_build_target
from ..families import modules_of
from ..weights.lora import merge_loras, parse_lora
from ..weights.names import to_diffusers
from ..weights.pickled import read_any_header
from .blueprint import LOWERING_FILE, Blueprint, draw
from .journal import Journal
from .manifest import make_manifest
from .options import BuildOptions, BuildRequest, Choices, resolve_options
from .output import check_replaceable, locked, partial_of, swap
from .work import clean, make_room, try_graphs, write_programs, write_tokenizer, write_weights

__all__ = ["build", "build_bundle"]


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    precision: Choices = None,
    quantize: Choices = None,
    recipe: str | Path | None = None,
    vae_tile: str = "auto",
    vae_caches: str = "fp32",
    decoder: str | Sequence[str] | None = None,
    resolution: str | Sequence[str] | None = None,
    variant: str | None = None,
    files: Mapping[str, str | Path] = {},
    lora: str | Sequence[str] = (),
    force: bool = False,
    run_graphs: bool = True,
    **target_options: Any,
) -> Path:
    """Build a bundle from a checkpoint; see `build_bundle`, also for what it raises.

    Args:
        checkpoint: its folder.
        output: that of the bundle.
        target: an installed target.
        precision: "fp32", "fp16" or "bf16" of the transformer's matrices, or by component: {"vae": "fp16"}.
        quantize: "w8a8-dynamic", "w8a8", "w8" or "w4" of the matrices of blocks, or by component.
        recipe: a file of `pyrexport calibrate`, for "w8a8".
        vae_tile: "auto", "none" or "HEIGHTxWIDTH" in latent pixels; see `choose_tiles`.
        vae_caches: "fp32" or "fp16".
        decoder: "full" or "tiny": the only one of the checkpoint's decoders that it is to hold; None: all.
        resolution: "FRAMESxHEIGHTxWIDTH", in place of the checkpoint's own; or several, the default first.
        variant: of the checkpoint's files, such as "fp16"; see `Files`.
        files: safetensors files in place of components' own: {"vae": "vae.safetensors"}; a "tiny_decoder" too.
        lora: files to be merged into the transformer, each as "FILE" or "FILE:SCALE"; see `merge_loras`.
        force: replace a bundle that is there.
        run_graphs: let a target that lowers graphs run each one before it is called done.
        target_options: its own options, such as `compute_capabilities=["8.9"]`: see `BuildTarget.build_options`.
    """
    sizes, found = tuple(map(Resolution.parse, _each(resolution))), find_build_target(target)
    opened = _open(Path(checkpoint), sizes, Files(variant, **{part: Path(file) for part, file in files.items()}), lora)
    by, only = Path(recipe) if recipe else None, tuple(_each(decoder))
    request = BuildRequest(precision, quantize, by, vae_tile, vae_caches, target_options, only, sizes)
    options = resolve_options(opened, found, request)
    return build_bundle(opened, found, Path(output), options, force=force, run_graphs=run_graphs)


def _each(values: str | Sequence[str] | None) -> Sequence[str]:
    """One value or several as several."""
    return [values] if isinstance(values, str) else values or ()


def _open(folder: Path, sizes: Sequence[Resolution], files: Files, lora: str | Sequence[str]) -> Checkpoint:
    size, header = next(iter(sizes), None), read_any_header
    found = read_checkpoint(folder, resolution=size, rename=to_diffusers, files=files, header=header)
    return merge_loras(found, [parse_lora(text) for text in _each(lora)])


def build_bundle(
    checkpoint: Checkpoint,
    target: BuildTarget,
    output: Path,
    options: BuildOptions,
    *,
    force: bool = False,
    run_graphs: bool = True,
    reporter: Reporter | None = None,
) -> Path:
    """Build a bundle.

    It is written to `OUTPUT.partial/`, and a rerun after an interruption keeps what is finished and whose inputs are
    unchanged.

    Args:
        checkpoint: read and checked.
        target: to build for.
        output: folder of the bundle.
        options: how weights are stored and frames are cut.
        force: replace a bundle that is there.
        run_graphs: let a target that lowers graphs run each one before it is called done.
        reporter: told about progress.

    Raises:
        UsageError: the output is there, is no bundle, or another build is writing it.
        CheckFailed: the disk is too small; what is finished is kept.
    """
    modules_of(checkpoint.model.family).check_components(checkpoint)
    check_replaceable(output, force)
    blueprint, partial, reporter = draw(checkpoint, target, options), partial_of(output), reporter or Reporter()
    for line in options.warnings:
        reporter.warned(line)
    with locked(partial, reporter):
        try:
            _write(partial, blueprint, reporter, run_graphs=run_graphs)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckFailed(
                f"{partial} cannot grow further ({error.strerror}): the weights alone take {blueprint.nbytes:,} bytes; "
                "make room and run again: what is finished is kept"
            ) from None
        swap(partial, output, force)
    return output


def _write(folder: Path, blueprint: Blueprint, reporter: Reporter, *, run_graphs: bool) -> None:
    """Write all files of a bundle, the manifest last."""
    journal = Journal(folder, blueprint)  # before any file: it is what tells the folder from somebody else's
    clean(folder, blueprint, journal)
    write_tokenizer(folder, blueprint)
    kept = {program for program in blueprint.programs if journal.keeps_program(program)}
    lowers = len(kept) < len(blueprint.programs)
    make_room(folder, blueprint, lowers=lowers)
    write_weights(folder, blueprint, journal, reporter, lowers=lowers)
    write_programs(folder, blueprint, journal, reporter, kept)
    graphs = try_graphs(folder, blueprint, journal, reporter, run=run_graphs)
    for component in blueprint.checkpoint.components:
        journal.identities.require_unchanged(component)
    (folder / LOWERING_FILE).unlink(missing_ok=True)
    files = [name for program in blueprint.programs for name in journal.files_of(program)]
    document = make_manifest(folder, blueprint, graphs, files, reporter).to_json()
    write_whole(folder / MANIFEST_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode())
