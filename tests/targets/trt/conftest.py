"""Bundles for TensorRT, and a pretended GPU that runs them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyrexport.cli import main
from pyrexport.export.proof.networks import graph_pipeline
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.targets.trt import session
from support import trt_stand_in
from support.builders import SMALL
from support.building import small_checkpoint
from support.trt_stand_in import Device, Runtime

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make_engines(shared: Make, make_checkpoint: Make) -> Make:
    """`make_engines("--kind", "ppf", precision="bf16")`: a tiny checkpoint's bundle; options are `build`'s."""

    def make(*arguments: str, **options: str) -> Path:
        asked = {"compute_capability": "8.9", "resolution": str(SMALL)} | options
        given = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
        checkpoint = make_checkpoint(*arguments)

        def build(out: Path) -> None:
            command = ["build", str(checkpoint), "--target", "trt", "-o", str(out), "--quiet", *given]
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 0, result.output

        return shared(("engines", *arguments, *given), build)

    return make


@pytest.fixture(scope="session")
def engines(make_engines: Make) -> Path:
    """The tiny pyramidal checkpoint in float32. Not to be changed: copy it."""
    return make_engines(precision="fp32")


@pytest.fixture(scope="session")
def networks(shared: Make, engines: Path, tiny: Path) -> Path:
    """The networks of `engines` for ONNX Runtime, one file for each graph."""

    def write(folder: Path) -> None:
        folder.mkdir()
        graph_pipeline(open_bundle(engines), small_checkpoint(tiny), folder, EngineOptions()).close()

    return shared(["networks"], write)


@pytest.fixture
def device(engines: Path, networks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    """A pretended GPU that runs the engines of `engines`; a test that leaves anything on it fails."""
    device = Device()
    fake = trt_stand_in.tensorrt(device, open_bundle(engines), networks)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr("cuda.bindings.runtime", Runtime(device))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield device
    assert device.leaks == 0
    assert not session._Program.opened
