"""The command line: one short module per command, loaded when it is called."""

import logging
import os
import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..runtime.errors import PyrexportError

__all__ = ["main"]

COMMANDS = {
    "build": "Build a bundle from a checkpoint.",
    "sample": "Sample a video from a bundle or a checkpoint.",
    "decode": "Decode latents that were sampled before.",
    "parity": "Prove that a bundle computes what its checkpoint computes.",
    "quality": "Measure how much a bundle's rounding changes videos.",
    "bench": "Measure a bundle: latency, load time, memory, glue.",
    "calibrate": "Collect statistics of a checkpoint's activations for quantisation.",
    "init": "Make a checkpoint of an author's files, or of random weights to try things on.",
    "inspect": "Show the stages, shapes, sizes and costs of a bundle or a checkpoint.",
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

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as click's own groups do, with every refusal in one line."""
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except PyrexportError as error:
            _refuse(error, str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _refuse(error, error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt) as error:
            _refuse(error.__cause__ or error, "interrupted", 130)
        except OSError as error:
            _refuse(error, f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)


def _refuse(error: BaseException, message: str, exit_code: int) -> None:
    """One line: the message, and what notes on the error add to it."""
    line = "; ".join([message, *getattr(error, "__notes__", ())])
    click.echo(f"Error: {' '.join(line.split())}", err=True)
    sys.exit(exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Export pyramidal video diffusion models to on-device runtimes, and prove that they still compute the same."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their notices are not about what the user asked
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao, which says what it could not load
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
