"""Everything that users hold on every target: each is made at a tiny size, built, and held against its reference.

    python scripts/check_matrix.py [--target ort] [--kind "a LoRA"]

Prints a table in Markdown of the largest relative L2 of stages, text and VAE.
"""

import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.holdings import HOLDINGS, OPTIONS, prove

LEVELS = ("text", "stages", "vae")


@click.command()
@click.option("--target", "targets", type=click.Choice(list(OPTIONS)), multiple=True, default=list(OPTIONS))
@click.option("--kind", "kinds", type=click.Choice(list(HOLDINGS)), multiple=True, default=list(HOLDINGS))
def main(targets: tuple[str, ...], kinds: tuple[str, ...]) -> None:
    """Build and prove each kind on each target."""
    rows, failed = list[str](), False
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("matrix", total=len(targets) * len(kinds))
        for kind in kinds:
            cells = []
            for target in targets:
                with tempfile.TemporaryDirectory() as name:
                    try:
                        levels = prove(HOLDINGS[kind](Path(name)), target, Path(name) / "bundle")
                        cells.append(f"{max(levels[level] for level in LEVELS if level in levels):.1e}")
                    except AssertionError as error:
                        click.echo(f"{kind} on {target}: {error}", err=True)
                        cells.append("failed")
                        failed = True
                bar.advance(task)
            rows.append(f"| {kind} | {' | '.join(cells)} |")
    click.echo(f"| | {' | '.join(targets)} |\n|---|{'---|' * len(targets)}")
    click.echo("\n".join(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
