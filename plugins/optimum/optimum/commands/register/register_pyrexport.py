"""`optimum-cli export pyrexport`: `pyrexport build` under the name that users of optimum look for.

optimum-cli reads every module of this folder. The folders above it are namespaces, and hold no `__init__.py`.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class PyrexportExportCommand(BaseOptimumCLICommand):
    """Hands all its arguments to `pyrexport build`."""

    COMMAND = CommandInfo("pyrexport", help="Build a bundle of a video diffusion model: as `pyrexport build`.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take every argument as it is."""
        parser.prefix_chars = "\0"  # no option is argparse's to read, -h neither
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Build; exit codes and messages are those of `pyrexport build`."""
        from pyrexport.cli import main

        main(["build", *self.args.arguments], prog_name="pyrexport")


REGISTER_COMMANDS = [(PyrexportExportCommand, ExportCommand)]
