"""From a checkpoint to a bundle: graphs, one weights file, a manifest; written beside and renamed into place."""

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...runtime.bundle.engines import Target, find_target
from ...runtime.bundle.manifest import CACHE_PRECISIONS, MANIFEST_FILE, PRECISIONS, TEXT_PRECISIONS
from ...runtime.bundle.tiles import parse_tile
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.model.checkpoint import Checkpoint, read_checkpoint
from ...runtime.reporter import Reporter
from ..families.wan.modules import check_parts
from ..families.wan.names import to_diffusers
from ..families.wan.text import check_supported
from ..lowering.memory import peak_bytes
from ..lowering.onnx import export_onnx
from .output import check_output, locked, partial_of, swap, write_synced
from .parts import Options, choose_tile, graph_parts
from .work import Work

__all__ = ["Options", "Reporter", "build", "build_bundle", "make_options", "plan_memory"]


def build_bundle(
    checkpoint: Checkpoint,
    target_name: str,
    target: Target,
    output: Path,
    *,
    options: Options | None = None,
    force: bool = False,
    run_graphs: bool = True,
    reporter: Reporter | None = None,
) -> Path:
    """Build a bundle.

    Parts are written to `OUTPUT.partial/`, and a rerun after an interruption keeps those that are finished and whose
    inputs are unchanged.

    Args:
        checkpoint: read and checked.
        target_name: of an installed target.
        target: found by that name.
        output: folder of the bundle.
        options: how weights are stored and frames are cut.
        force: replace a bundle that is there.
        run_graphs: let a target that lowers graphs run each one before it is called done.
        reporter: told about progress.

    Raises:
        UsageError: the target cannot take the options, or the output is there, is no bundle, or another build is writing it.
        CheckFailed: the disk is too small; finished parts are kept.
    """
    options = _check_target(target_name, target, checkpoint, options or Options())
    check_parts(checkpoint)
    check_supported(checkpoint.text_encoder_config)
    check_output(output, force)
    partial = partial_of(output)
    with locked(partial):
        work = Work(
            checkpoint,
            target_name,
            target,
            partial,
            options,
            reporter or Reporter(),
            run_graphs=run_graphs,
        )
        try:
            document = work.run()
            write_synced(partial / MANIFEST_FILE, json.dumps(document, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckFailed(
                f"{partial} cannot grow further ({error.strerror}): the weights alone take {work.nbytes:,} bytes; make "
                "room and run again: finished parts are kept"
            ) from None
        swap(partial, output, force)
    return output


def _check_target(name: str, target: Target, checkpoint: Checkpoint, options: Options) -> Options:
    """Refuse options that a target cannot take; say which GPUs are built for, where that is asked.

    Raises:
        UsageError: it stores weights, or caches, in another precision, or knows no layouts or compute capabilities.
    """
    caches = {dtype: precision for precision, dtype in CACHE_PRECISIONS.items()}[options.vae_caches]
    try:
        target.engine()
    except ImportError as error:
        raise UsageError(f"target '{name}' cannot build here: {error}; install its engine") from error
    if target.GROUPING != "profiles" and (options.layout or options.compute_capabilities):
        raise UsageError(f"target '{name}' has neither layouts nor compute capabilities: leave them out")
    for what, precision in (
        ("weights", options.precision),
        ("text encoder", options.text_precision),
        ("caches", caches),
    ):
        if precision not in target.PRECISIONS:
            raise UsageError(
                f"target '{name}' takes its {what} in {' or '.join(target.PRECISIONS)}, found {precision}: "
                "build for another target, or in that precision"
            )
    if target.FORM == "network" and options.vae_caches != "float32":
        raise UsageError(f"target '{name}' keeps the decoder's caches in fp32, found {caches}: leave --vae-caches out")
    if target.FORM == "network" and checkpoint.text_encoder and options.text_precision == "fp16":
        raise UsageError(
            f"target '{name}' computes as it stores, and UMT5 leaves fp16's range: take --text-precision bf16"
        )
    if target.GROUPING != "profiles":
        return options
    return replace(options, compute_capabilities=target.compute_capabilities(options.compute_capabilities))


def build(
    checkpoint: str | Path,
    output: str | Path,
    *,
    target: str = "ort",
    precision: str = "fp32",
    text_precision: str | None = None,
    vae_tile: str = "auto",
    vae_caches: str = "fp32",
    resolution: str | None = None,
    layout: str = "",
    compute_capabilities: Sequence[str] = (),
    force: bool = False,
    run_graphs: bool = True,
) -> Path:
    """Build a bundle from a checkpoint folder; see `build_bundle`.

    Args:
        checkpoint: a folder.
        output: folder of the bundle.
        target: an installed target.
        precision: "fp32", "fp16" or "bf16".
        text_precision: of the text encoder, also "int8" or "int4"; None: the same.
        vae_tile: "auto", "none" or "HEIGHTxWIDTH" in latent pixels; see `choose_tile`.
        vae_caches: "fp32" or "fp16".
        resolution: "FRAMESxHEIGHTxWIDTH", in place of the checkpoint's own.
        layout: "shared" or "per-stage", for TensorRT; empty: shared.
        compute_capabilities: of the GPUs to build for, such as "8.9", for TensorRT; none: the GPU that is here.
        force: replace a bundle that is there.
        run_graphs: let a target that lowers graphs run each one before it is called done.

    Raises:
        UsageError: the checkpoint, the target or the output does not fit.
    """
    for wanted, known in (
        (precision, PRECISIONS),
        (text_precision or precision, TEXT_PRECISIONS),
        (vae_caches, CACHE_PRECISIONS),
    ):
        if wanted not in known:
            raise UsageError(f"unknown precision '{wanted}': expected one of {', '.join(known)}")
    size = None if resolution is None else Resolution.parse(resolution)
    opened = read_checkpoint(Path(checkpoint), resolution=size, rename=to_diffusers)
    found = find_target(target)
    options = make_options(
        opened, found, precision, text_precision, vae_tile, vae_caches, layout, tuple(compute_capabilities)
    )
    return build_bundle(opened, target, found, Path(output), options=options, force=force, run_graphs=run_graphs)


def make_options(
    checkpoint: Checkpoint, target: Target, precision: str, text_precision: str | None, vae_tile: str, vae_caches: str,
    layout: str = "", compute_capabilities: tuple[str, ...] = (),
) -> Options:  # fmt: skip
    """Options as `build` takes them, the tile chosen where it is "auto".

    The text encoder follows the precision of the rest, but where a target computes in 16 bits: UMT5 leaves fp16's range.

    Raises:
        UsageError: the tile is malformed, too small, or larger than the frame; an option is for a part that is not there.
    """
    if text_precision is not None and not checkpoint.text_encoder:
        raise UsageError(f"{checkpoint.folder} has no text encoder: a precision of it says nothing")
    if not checkpoint.vae and (vae_tile not in ("auto", "none") or vae_caches != "fp32"):
        raise UsageError(f"{checkpoint.folder} has no VAE: a tile or caches of it say nothing")
    tile = None
    if checkpoint.vae:
        height, width = checkpoint.model.pyramid.stages[0].latent[2:]
        if vae_tile == "auto":
            tile = choose_tile(checkpoint, CACHE_PRECISIONS[vae_caches])
        elif vae_tile != "none":
            tile = parse_tile(vae_tile)
            if tile[0] > height or tile[1] > width:
                raise UsageError(f"a tile of {vae_tile} latent pixels is larger than the frame's {height}x{width}")
    if layout not in ("", "shared", "per-stage"):
        raise UsageError(f"unknown layout '{layout}': expected shared or per-stage")
    if text_precision is None:
        text_precision = "bf16" if precision == "fp16" and target.FORM == "network" else precision
    return Options(precision, text_precision, tile, CACHE_PRECISIONS[vae_caches], layout, compute_capabilities)


def plan_memory(
    checkpoint: Checkpoint, *, options: Options | None = None, reporter: Reporter | None = None
) -> dict[str, int]:
    """What a run of each graph of a bundle would take in memory, in bytes, without weights; writes nothing.

    Args:
        checkpoint: read and checked.
        options: see `build_bundle`.
        reporter: told about progress.
    """
    check_parts(checkpoint)
    check_supported(checkpoint.text_encoder_config)
    reporter = reporter or Reporter()
    found = {}
    for part in graph_parts(checkpoint, options or Options()):
        reporter.part(f"graph {part.name}", 1)
        found[part.name] = peak_bytes(
            export_onnx(part.module, part.inputs, part.outputs, part.name, layers=part.layers).model
        )
        reporter.advance(1)
    return found
