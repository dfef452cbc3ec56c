"""The README's commands and its Python run as they stand there, on the checkpoint that it names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DATA, ROOT
from pyrexport.cli import main
from pyrexport.runtime.documents import Fields
from pyrexport.runtime.model.description import parse_model, parse_resolution
from pyrexport.runtime.model.families.wan import WAN, WanConfig

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_readme_succeeds_in_order(tmp_path, monkeypatch):
    """About two minutes, most of it the two builds."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, "tests/data")
    Path("demo").mkdir()
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "pyrexport"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, (command, result.output)
        assert result.stdout.strip(), command
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert Path("demo/api.pyrx/manifest.json").is_file()


def test_the_readmes_pyramid_json_is_one():
    (text,) = blocks("json")
    document = json.loads(text)
    size = Fields({"resolution": document.pop("resolution")}, "README")
    model = parse_model(document, WAN, WanConfig(), "README")
    assert model.stages(parse_resolution(size))
    for name, schedule in document["schedules"].items():
        document["schedules"][name] = {"solver": "euler"} | schedule  # the only field that it may leave out
    assert model.to_json() == document
