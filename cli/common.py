"""What several commands share: options, opening a checkpoint, progress, and the two forms of output."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from ..runtime.bundle.engines import MAX_THREADS, EngineOptions, Option, installed_targets
from ..runtime.bundle.opening import is_bundle
from ..runtime.chain.pyramid import Resolution
from ..runtime.chain.solvers import SOLVERS
from ..runtime.errors import UsageError
from ..runtime.quantisation import DECODERS
from ..runtime.reporter import Reporter

__all__ = [
    "PATH",
    "Bars",
    "ResolutionType",
    "decoder_option",
    "engine_options",
    "guidance_options",
    "length_options",
    "output_options",
    "own_options",
    "print_json",
    "print_memory",
    "print_table",
    "progress",
    "read_prompts",
    "require_bundle",
    "sampling_options",
]

F = TypeVar("F", bound=Callable[..., Any])


class _GivenPath(click.Path):
    """A path; one that says "here" stays absolute, since a `Path` would forget it, and hub IDs look like the rest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        here = isinstance(value, str) and value.startswith(("./", ".\\"))
        return super().convert(os.path.abspath(value) if here else value, param, ctx)


PATH = _GivenPath(path_type=Path)


class ResolutionType(click.ParamType):  # type: ignore[type-arg]
    """A resolution as FRAMESxHEIGHTxWIDTH."""

    name = "FxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Resolution:
        return value if isinstance(value, Resolution) else Resolution.parse(str(value))


def output_options(command: F) -> F:
    """The options `--json` and `--quiet`."""
    command = click.option("--quiet", is_flag=True, help="No progress bars.")(command)
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else there.")(
        command
    )


def own_options(options: Iterable[Option], name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that only some targets have: those that were given become one argument, a mapping by their names."""
    known = {option.name: option for option in options}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapped(*arguments: Any, **values: Any) -> Any:
            given = {option: values.pop(option) for option in known}
            given = {option: value for option, value in given.items() if value != known[option].default}
            return command(*arguments, **values, **{name: given})

        decorated: Callable[..., Any] = wrapped
        for option in known.values():
            decorated = _click_option(option)(decorated)
        return decorated

    return decorate


def _click_option(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if option.switch:
        return click.option(option.flag, option.name, is_flag=True, help=option.help)
    kind = click.Choice(list(option.choices)) if option.choices else str

    def take(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if option.listing is not None and "list" in (value or ()):
            found = option.listing()
            print_table(found.title, found.columns, found.rows)
            context.exit()
        if "" in (value if option.many else [value]):
            raise click.BadParameter("expected a value, found an empty one")
        return option.default if value is None else value

    return click.option(
        option.flag,
        option.name,
        type=kind,
        multiple=option.many,
        default=option.default or None,
        metavar=option.metavar or None,
        help=option.help,
        is_eager=option.listing is not None,
        callback=take,
    )


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option `--threads`, and those that installed targets have beside it, as one argument `engine`."""

    @wraps(command)
    def wrapped(*arguments: Any, threads: int, own: Mapping[str, Any], **others: Any) -> Any:
        return command(*arguments, engine=EngineOptions(threads, own), **others)

    every = [option for target in installed_targets() for option in target.engine_options]
    threads = click.IntRange(0, MAX_THREADS)
    with_own = own_options(every, "own")(wrapped)
    return click.option(
        "--threads", type=threads, default=0, help="Of one operator; 0: a thread for each usable core."
    )(with_own)


def decoder_option(command: F) -> F:
    """The option `--decoder`, of one."""
    return click.option(
        "--decoder", type=click.Choice(list(DECODERS)), help="What decodes frames, in place of the first that is there."
    )(command)


NO_GUIDANCE: Mapping[str, float | None] = {"guidance_scale": None, "guidance_scale_2": None}
"""What is given where nobody says how to guide."""


def guidance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--guidance-scale` and `--guidance-scale-2`, as one argument `guidance`: see `Model.schedule`."""

    @wraps(command)
    def wrapped(*arguments: Any, guidance_scale: float | None, guidance_scale_2: float | None, **others: Any) -> Any:
        scales = dict(zip(NO_GUIDANCE, (guidance_scale, guidance_scale_2), strict=True))
        return command(*arguments, guidance=scales, **others)

    second = click.option("--guidance-scale-2", type=float, help="Of the second of two networks.")
    return click.option("--guidance-scale", type=float, help="In place of the schedule's own.")(second(wrapped))


def length_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--chunks` and `--frames`, as one argument `length`: see `chunks.chunk_count`."""

    @wraps(command)
    def wrapped(*arguments: Any, chunks: int | None, frames: int | None, **others: Any) -> Any:
        return command(*arguments, length={"chunks": chunks, "frames": frames}, **others)

    frames = click.option("--frames", type=int, help="As many chunks as hold so many frames, in place of --chunks.")
    chunks = "How long the video is, of a model that makes it in chunks: one by default."
    return click.option("--chunks", type=int, help=chunks)(frames(wrapped))


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose a schedule, guidance and a seed."""
    for option in (
        click.option("--seed", type=int, show_default="0"),
        click.option("--levels", help="Natural levels in place of a schedule: 1,0.9863/0.9412,0.8645/0.5858"),
        click.option("--schedule", help="A schedule of the model, or steps per stage, coarsest first: 10-10-10"),
        click.option("--solver", type=click.Choice(list(SOLVERS)), help="In place of the schedule's own."),
        guidance_options,
        click.option("--negative-prompt", help="In place of the model's own."),
    ):
        command = option(command)
    return command


def require_bundle(folder: Path) -> None:
    """Refuse a path that is no bundle.

    Raises:
        UsageError: it is none.
    """
    if not is_bundle(folder):
        raise UsageError(f"{folder} is not a bundle: expected a folder with manifest.json")


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


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table for people on stdout."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 110).print(table)


def print_memory(peaks: Mapping[str, int], resolution: str) -> None:
    """What each graph is expected to take when it runs in a process of its own, as planned or as measured before."""
    if not peaks:
        return
    rows = [[name, f"{nbytes / 2**20:,.0f}"] for name, nbytes in peaks.items()]
    print_table("expected peak of anonymous memory", [f"graph at {resolution}", "MiB"], rows)


class Bars(Reporter):
    """A bar for each piece of work, in a display that is open."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, TaskID(0)

    def begin(self, name: str, total: int) -> None:
        self.task = self.bar.add_task(name, total=max(total, 1))

    def advance(self, units: int) -> None:
        self.bar.advance(self.task, units)

    def kept(self, name: str) -> None:
        if not self.bar.disable:
            self.bar.console.print(f"{name}: kept from an interrupted build")

    def said(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.console.print(line, soft_wrap=True)

    def warned(self, line: str) -> None:
        self.said(line)


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr, with an estimate."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        yield bar


def by_component(values: tuple[str, ...], flag: str) -> dict[str, str]:
    """Values of an option that is given as [COMPONENT=]VALUE, by component."""
    out: dict[str, str] = {}
    for value in values:
        component, _, name = value.rpartition("=")
        component = component if "=" in value else "transformer"
        if component in out:
            raise UsageError(f"{flag} is given twice for the {component}: {out[component]} and {name}")
        out[component] = name
    return out
