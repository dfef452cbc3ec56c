"""Models of any shape: each is built and agrees with its reference, or is refused with a rule.

    python scripts/check_pyramids.py [--count 200] [--seed 0] [--target ort]

Kinds, stages, axes, first frames, wavelets, clean levels, widths, resolutions and options are drawn by hypothesis. A
failure is made smaller before it is shown, with the seed and the line that draws it again.
"""

import sys
from collections import Counter
from pathlib import Path

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.pyramids import OPTIONS, AnyModel, any_model, outcome, summary


@click.command()
@click.option("--count", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", "chosen", type=click.IntRange(0), default=0, show_default=True)
@click.option("--target", type=click.Choice(list(OPTIONS)), default="ort", show_default=True)
def main(count: int, chosen: int, target: str) -> None:
    """Draw COUNT models and try each."""
    outcomes: Counter[str] = Counter()

    @seed(chosen)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(any_model(target))
    def attempt(model: AnyModel) -> None:
        outcomes[outcome(model, target)] += 1
        bar.advance(task)

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("models", total=count)
        try:
            attempt()
        except BaseException:
            click.echo(f"seed {chosen}", err=True)
            raise
    click.echo(summary(outcomes))


if __name__ == "__main__":
    main()
