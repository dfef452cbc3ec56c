"""What several commands share: options, opening a checkpoint, progress, and the two forms of output."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..runtime.bundle.engines import MAX_THREADS, EngineOptions
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import UsageError
from ..runtime.model.checkpoint import Checkpoint, read_checkpoint
from ..runtime.reporter import Reporter

__all__ = [
    "Bars",
    "ResolutionType",
    "engine_options",
    "output_options",
    "print_json",
    "print_table",
    "progress",
    "read_prompts",
    "resolve_checkpoint",
    "sampling_options",
]

F = TypeVar("F", bound=Callable[..., Any])


class ResolutionType(click.ParamType):  # type: ignore[type-arg]
    """FRAMESxHEIGHTxWIDTH."""

    name = "FxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Resolution:
        return value if isinstance(value, Resolution) else Resolution.parse(str(value))


def output_options(command: F) -> F:
    """`--json` and `--quiet`."""
    command = click.option("--quiet", is_flag=True, help="No progress bars.")(command)
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")(
        command
    )


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--threads`, `--prepack` and `--provider`, as one argument `engine`."""

    @wraps(command)
    def wrapped(*arguments: Any, threads: int, prepack: bool, provider: str, **others: Any) -> Any:
        return command(*arguments, engine=EngineOptions(threads, prepack, provider), **others)

    for option in (
        click.option(
            "--provider", default="", metavar="NAME", help="ONNX Runtime's execution provider, in place of the CPU's."
        ),
        click.option("--prepack", is_flag=True, help="Let the engine copy weights into its own layout."),
        click.option(
            "--threads", type=click.IntRange(0, MAX_THREADS), default=0, help="Of one operator; 0: the engine's choice."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def sampling_options(command: F) -> F:
    """Options that choose a schedule, guidance and a seed."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--levels", help="Natural levels in place of a schedule: 1,0.9863/0.9412,0.8645/0.5858"),
        click.option("--schedule", help="A schedule of the model, or steps per stage, coarsest first: 10-10-10"),
        click.option("--guidance-scale", type=float, help="In place of the schedule's own."),
        click.option("--negative-prompt", help="In place of the model's own."),
    ):
        command = option(command)
    return command


def resolve_checkpoint(folder: Path, resolution: Resolution | None = None) -> Checkpoint:
    """Read a checkpoint; diffusers is imported only if the tensors carry Wan's original names."""

    def rename(names: list[str]) -> Mapping[str, str]:
        from ..export.families.wan.names import to_diffusers

        return to_diffusers(names)

    return read_checkpoint(folder, resolution=resolution, rename=rename)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, one a line; empty lines are skipped.

    Raises:
        UsageError: the file is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a text file with a prompt a line, found {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompt: expected one a line")
    return prompts


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people on stdout."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 110).print(table)


def print_memory(peaks: Mapping[str, int]) -> None:
    """A table of what each graph is expected to take when it runs, in a process of its own, as planned or as measured before."""
    if not peaks:
        return
    rows = [[name, f"{nbytes / 2**20:,.0f}"] for name, nbytes in peaks.items()]
    print_table("expected peak of anonymous memory", ["graph", "MiB"], rows)


class Bars(Reporter):
    """A bar per part, in a display that is open."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, TaskID(0)

    def part(self, name: str, total: int) -> None:
        self.task = self.bar.add_task(name, total=max(total, 1))

    def advance(self, units: int) -> None:
        self.bar.advance(self.task, units)

    def kept(self, name: str) -> None:
        if not self.bar.disable:
            self.bar.console.print(f"{name}: kept from an interrupted build")

    def said(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.console.print(line, soft_wrap=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr, with an estimate."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        yield bar
