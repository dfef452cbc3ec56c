"""The command line: one short module per command, loaded when it is called."""

import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..runtime.errors import PyrexportError

__all__ = ["main"]

COMMANDS = {
    "inspect": "Show the stages, shapes, sizes and costs of a checkpoint.",
    "sample": "Sample a video.",
}


class Commands(click.Group):
    """Imports a command's module when the command is called, and turns our errors into click's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __name__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PyrexportError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Export pyramidal video diffusion models to on-device runtimes, and prove that they still compute the same."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
