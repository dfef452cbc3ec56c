"""A small checkpoint, and its bundle of ExecuTorch programs."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from pyrexport.export.bundle.build import build_bundle
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.files import cache_folder
from pyrexport.runtime.reporter import Reporter
from pyrexport.targets.executorch.compile import library_file
from pyrexport.targets.executorch.session import ExecutorchEngine
from pyrexport.targets.facts import find_build_target
from support.building import build_options, small_checkpoint

Make = Callable[..., Path]


class Lines(Reporter):
    """What a build said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="session")
def tiny(shared: Make, make_checkpoint: Make) -> Path:
    """Smaller than the other tests': lowering takes its time by the operator."""
    checkpoint = make_checkpoint("--blocks", "1", "--stages", "2")

    def write(folder: Path) -> None:
        shutil.copytree(checkpoint, folder)
        shutil.rmtree(folder / "vae")
        torch.manual_seed(0)
        AutoencoderKLWan(base_dim=8, num_res_blocks=0).save_pretrained(folder / "vae")

    return shared(["checkpoint of executorch"], write)


@pytest.fixture(scope="session")
def library(shared: Make) -> None:
    """The session's library, compiled once for all processes that test side by side."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("the session's library needs a C++ compiler")

    def write(folder: Path) -> None:
        folder.mkdir()
        with library_file() as compiled:
            for file in compiled.parent.glob(f"{compiled.stem}.*"):
                shutil.copy2(file, folder)

    shutil.copytree(shared(["library of executorch"], write), cache_folder(), dirs_exist_ok=True)


@pytest.fixture(scope="session")
def built(shared: Make, tiny: Path, library: None) -> SimpleNamespace:
    """A bundle of the tiny checkpoint with all parts, and what its build said: about two minutes."""

    def write(folder: Path) -> None:
        folder.mkdir()
        checkpoint, target, reporter = small_checkpoint(tiny), find_build_target("executorch"), Lines()
        build_bundle(checkpoint, target, folder / "bundle", build_options(checkpoint, target), reporter=reporter)
        (folder / "lines.json").write_text(json.dumps(reporter.lines))

    folder = shared(["bundle of executorch"], write)
    return SimpleNamespace(folder=folder / "bundle", lines=json.loads((folder / "lines.json").read_text()))


@pytest.fixture
def copy(built: SimpleNamespace, tmp_path: Path) -> Path:
    """The bundle, to be changed."""
    return Path(shutil.copytree(built.folder, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def engine(built: SimpleNamespace) -> Iterator[ExecutorchEngine]:
    """The coarsest stage, open."""
    entry = open_bundle(built.folder).manifest.graphs[stage_key(1)]
    opened = ExecutorchEngine(built.folder / entry.file, entry.spec, EngineOptions())
    yield opened
    opened.close()
