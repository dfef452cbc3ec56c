"""`pyrexport init`: make a checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..export.init.presets import PRESETS
from ..runtime.chain.kinds import KINDS
from ..runtime.chain.pyramid import Resolution
from ..runtime.dtypes import WEIGHT_DTYPES
from ..runtime.errors import UsageError
from .common import PATH, Bars, ResolutionType, by_component, output_options, print_json, progress
from .reading import Weights, weights_options

OF_RANDOM = ("blocks", "width", "no_text_encoder", "no_vae", "dtype", "shard_bytes", "seed")
"""Options that only a checkpoint of random weights has."""

OF_SOURCE = (
    "weights",
    "tokenizer",
    "first_frame_embedding",
    "patch_layers",
    "heads",
    "boundary_ratio",
    "axes",
    "first_frame",
    "clean_levels",
    "schedules",
    "shift",
    "negative_prompt",
    "copies",
)
"""Options that only a checkpoint of an author's files has."""


ADDED = "[COMPONENT=]FILE"


def random_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `OF_RANDOM`."""
    for option in (
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random weights."),
        click.option("--shard-bytes", type=click.IntRange(1), default=10_000_000_000, show_default=True),
        click.option(
            "--dtype", type=click.Choice(WEIGHT_DTYPES), help="Of a random transformer; float32, 14b bfloat16."
        ),
        click.option("--no-vae", is_flag=True, help="Leave a random VAE out."),
        click.option("--no-text-encoder", is_flag=True, help="Leave a random text encoder out."),
        click.option("--width", type=click.IntRange(1), help="Of a random transformer (a multiple of the head size)."),
        click.option("--blocks", type=click.IntRange(1), help="Transformer blocks, in place of the preset's."),
        click.option(
            "--random",
            "preset",
            type=click.Choice(list(PRESETS)),
            help="The real names and shapes of a model, with random weights, to try things on.",
        ),
    ):
        command = option(command)
    return command


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `OF_SOURCE`."""
    for option in (
        click.option("--copy", "copies", is_flag=True, help="Copy files in place of linking to them."),
        click.option("--negative-prompt", help="What guided schedules lead away from."),
        click.option("--shift", type=float, help="Timestep shift of schedules."),
        click.option(
            "--schedule",
            "schedules",
            multiple=True,
            metavar="[NAME=]STEPS[:GUIDANCE[,GUIDANCE_2]]",
            help="Such as 2-2-1:1, or NAME=LEVELS such as few=1,0.98/0.94,0.86/0.58; the first is the default.",
        ),
        click.option("--clean-levels", metavar="LEVEL,…", help="Where each stage ends, finest first."),
        click.option("--first-frame", type=click.Choice(["separate", "joint"]), help="Of a pyramidal model's groups."),
        click.option("--axes", help="That a pyramidal model's stages halve: some of THW."),
        click.option("--heads", type=click.IntRange(1), help="Of the attention, where no config.json says it."),
        click.option("--boundary-ratio", type=float, help="Of two networks: where the second takes over, 0 to 1."),
        click.option("--patch-layers", multiple=True, metavar=ADDED, help="The patch layers of a PPF model's stages."),
        click.option("--first-frame-embedding", multiple=True, metavar=ADDED, help="A pyramidal model's vector."),
        click.option("--tokenizer", type=PATH, help="A folder with tokenizer.json."),
        weights_options,
    ):
        command = option(command)
    return command


@click.command()
@click.argument("source", type=PATH, required=False)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the checkpoint.")
@click.option("--kind", type=click.Choice(list(KINDS)), help="Pyramidal, or what a source's tensors say.")
@click.option("--stages", type=click.IntRange(1, 4), help="3, or what a source's tensors say.")
@click.option("--wavelet", help="Of a pyramidal model: haar unless another is given.")
@click.option("--resolution", type=ResolutionType(), help="In place of the preset's, or of a source's.")
@source_options
@random_options
@click.option("--force", is_flag=True, help="Replace a checkpoint that is there.")
@output_options
def command(
    source: Path | None,
    output: Path,
    preset: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Make a checkpoint at OUTPUT: of an author's files, a folder or a file of weights, or of random weights."""
    if (preset is None) == (source is None):
        extra = f": leave {source} out" if source is not None else ""
        raise UsageError(f"give a SOURCE, or --random {'|'.join(PRESETS)} to make a checkpoint of nothing{extra}")
    context = click.get_current_context()
    given = [name for name in fields if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    given += ["weights"] if fields["weights"] != Weights() else []
    if source is None:
        _refuse(given, OF_SOURCE, "--random")
        _random(output, preset, fields, force=force, as_json=as_json, quiet=quiet)
    else:
        _refuse(given, OF_RANDOM, "a SOURCE")
        _assemble(source, output, fields, force=force, as_json=as_json, quiet=quiet)


def _refuse(given: Sequence[str], others: Sequence[str], beside: str) -> None:
    flags = {"schedules": "schedule", "copies": "copy", "weights": "lora, --variant or a component's file"}
    for name in given:
        if name in others:
            raise UsageError(f"--{flags.get(name, name.replace('_', '-'))} says nothing beside {beside}")


def _random(
    output: Path, preset: str | None, fields: dict[str, Any], *, force: bool, as_json: bool, quiet: bool
) -> None:
    from ..export.init.random import RandomModel, write_random

    named = ("kind", "stages", "wavelet", "resolution", "blocks", "width", "dtype", "shard_bytes", "seed")
    chosen = {name: fields[name] for name in named if fields[name] is not None}
    chosen |= {"text_encoder": not fields["no_text_encoder"], "vae": not fields["no_vae"]}
    with progress(quiet) as bar:
        write_random(output, RandomModel(str(preset), **chosen), force=force, reporter=Bars(bar))
    nbytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        print_json({"checkpoint": str(output), "preset": preset, "bytes": nbytes})
    else:
        click.echo(f"{output}: {preset}, random weights, {nbytes:,} bytes")


def _assemble(source: Path, output: Path, fields: dict[str, Any], *, force: bool, as_json: bool, quiet: bool) -> None:
    from ..export.init.assemble import Assembly, assemble
    from ..export.init.described import Description
    from ..export.weights.lora import parse_lora

    weights: Weights = fields["weights"]
    resolution: Resolution | None = fields["resolution"]
    named = ("kind", "stages", "wavelet", "axes", "first_frame", "schedules", "shift", "negative_prompt")
    description = Description(
        **{name: fields[name] for name in named},
        clean_levels=_numbers(fields["clean_levels"], "--clean-levels"),
        resolution=resolution,
    )
    loras = tuple(parse_lora(text) for text in weights.loras)
    others = {"tokenizer": fields["tokenizer"], "boundary": fields["boundary_ratio"]}
    others |= {"heads": fields["heads"], "copies": fields["copies"]}
    for name, option in (("first_frame", "first_frame_embedding"), ("patch_layers", "patch_layers")):
        added = by_component(fields[option], f"--{option.replace('_', '-')}")
        others[name] = {component: Path(file) for component, file in added.items()}
    asked = Assembly(source, weights.files, loras=loras, description=description, **others)
    with progress(quiet) as bar:
        made = assemble(output, asked, force=force, reporter=Bars(bar))
    model = made.checkpoint.model
    notes = {"assumed": made.assumed, "missing": made.missing, "left_out": made.left_out}
    if as_json:
        said = {"kind": model.pyramid.kind.name, "stages": model.pyramid.depth, "components": dict(made.how)}
        print_json({"checkpoint": str(output), **said, **{name: list(values) for name, values in notes.items()}})
        return
    parts = ", ".join(f"{name} {how}" for name, how in made.how.items())
    click.echo(f"{output}: {model.pyramid.kind.name}, {model.pyramid.depth} stage(s); {parts}")
    for name, values in notes.items():
        if values:
            click.echo(f"{name.replace('_', ' ')}: {'; '.join(values)}")


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} are numbers separated by commas, found '{text}'") from None
