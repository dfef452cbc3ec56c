"""`pyrexport build`: a checkpoint to a bundle."""

from pathlib import Path

import click
from rich.progress import Progress, TaskID

from ..runtime.engines import find_target, target_names
from ..runtime.manifest import PRECISIONS
from ..runtime.pyramid import Resolution
from .common import ResolutionType, output_options, print_json, progress, resolve_checkpoint


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", "target_name", required=True, help=f"One of {', '.join(target_names())}.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Of the stored matrices.",
)
@click.option("--resolution", type=ResolutionType(), help="In place of the checkpoint's own.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@output_options
def command(
    checkpoint: Path, target_name: str, output: Path, precision: str, resolution: Resolution | None, force: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build a bundle from a CHECKPOINT. An interrupted build goes on where it stopped."""
    target = find_target(target_name)
    opened = resolve_checkpoint(checkpoint, resolution)
    from ..export.build import Reporter, build_bundle
    from ..export.output import check_output

    check_output(output, force)

    class Bars(Reporter):
        """A bar per part."""

        def __init__(self, bar: Progress) -> None:
            self.bar, self.task = bar, TaskID(0)

        def part(self, name: str, total: int) -> None:
            self.task = self.bar.add_task(name, total=max(total, 1))

        def advance(self, units: int) -> None:
            self.bar.advance(self.task, units)

        def kept(self, name: str) -> None:
            self.bar.console.print(f"{name}: kept from an interrupted build")

    with progress(quiet) as bar:
        build_bundle(opened, target_name, target, output, precision=precision, force=force, reporter=Bars(bar))
    nbytes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if as_json:
        print_json({"bundle": str(output), "target": target_name, "precision": precision, "files": nbytes})
    else:
        click.echo(f"{output}: {len(nbytes)} files, {sum(nbytes.values()):,} bytes")
