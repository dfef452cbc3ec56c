"""`pyrexport init`: make a checkpoint."""

from pathlib import Path
from typing import Any

import click

from ..export.init.presets import PRESETS
from ..runtime.chain.kinds import KINDS
from ..runtime.dtypes import WEIGHT_DTYPES
from ..runtime.errors import UsageError
from .common import PATH, Bars, ResolutionType, output_options, print_json, progress


@click.command()
@click.argument("source", type=PATH, required=False)
@click.option("-o", "--output", type=PATH, required=True, help="Folder of the checkpoint.")
@click.option(
    "--random",
    "preset",
    type=click.Choice(PRESETS),
    help="The real names and shapes of a model, with random weights, to try things on.",
)
@click.option("--kind", type=click.Choice(list(KINDS)), default="pyramidal", show_default=True)
@click.option("--blocks", type=click.IntRange(1), help="Transformer blocks, in place of the preset's.")
@click.option("--width", type=click.IntRange(1), help="Model width (a multiple of the head size); ffn in proportion.")
@click.option("--stages", type=click.IntRange(1, 4), default=3, show_default=True)
@click.option("--wavelet", default="haar", show_default=True)
@click.option("--resolution", type=ResolutionType(), help="In place of the preset's.")
@click.option("--text-encoder/--no-text-encoder", default=True, show_default=True)
@click.option("--vae/--no-vae", default=True, show_default=True)
@click.option("--dtype", type=click.Choice(WEIGHT_DTYPES), help="Of the transformer; float32, or bfloat16 for 14b.")
@click.option("--shard-bytes", type=click.IntRange(1), default=10_000_000_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
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
    """Make a checkpoint of random weights at OUTPUT."""
    if preset is None:
        raise UsageError(f"give --random {'|'.join(PRESETS)}: a checkpoint is not made of anything else yet")
    if source is not None:
        raise UsageError(f"--random makes a checkpoint of nothing: leave {source} out")
    from ..export.init.random import RandomModel, write_random

    with progress(quiet) as bar:
        write_random(output, RandomModel(preset, **fields), force=force, reporter=Bars(bar))
    nbytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        print_json({"checkpoint": str(output), "preset": preset, "bytes": nbytes})
    else:
        click.echo(f"{output}: {preset}, random weights, {nbytes:,} bytes")
