"""Hooks of mkdocs: notebooks become pages, and where a page says so, it has every command's options from click."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from notebooks import as_markdown
from pyrexport.cli import COMMANDS, main

MARK = "<!-- the options of every command -->"


def on_files(files: Files, config: Any) -> Files:
    """Called once, with all that lies in the pages' folder."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix == ".ipynb":
            page = as_markdown(Path(config.docs_dir) / path)
            files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page))
    return files


def on_page_markdown(markdown: str, **mkdocs: Any) -> str:
    """Called for each page before it is rendered."""
    return markdown.replace(MARK, "\n".join(_sections())) if MARK in markdown else markdown


def _sections() -> Iterator[str]:
    for name in COMMANDS:
        context = click.Context(main)
        command = main.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=click.Context(main, info_name="pyrexport"))
        yield from (
            f"## {name}",
            "",
            command.help or "",
            "",
            "```",
            own.command_path + " " + _usage(command, own),
            "```",
        )
        yield from ("", "| option | |", "|---|---|")
        for parameter in command.get_params(own):
            record = parameter.get_help_record(own)
            if record is not None and parameter.param_type_name == "option":
                option, words = map(_cell, record)
                yield f"| <code>{option}</code> | {words} |"
        yield ""


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join(command.collect_usage_pieces(context))


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return escape(" ".join(text.split())).replace("|", "&#124;").replace("*", "&#42;")
