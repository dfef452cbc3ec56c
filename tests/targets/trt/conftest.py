"""Bundles for TensorRT, and a pretended GPU that runs them."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from pyrexport.cli import main
from pyrexport.export.proof.networks import graph_pipeline
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.graphs import STAGE
from pyrexport.runtime.bundle.manifest import MANIFEST_FILE
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.targets.cutting import cut_network, stored_bytes
from pyrexport.targets.forms import OnnxForm
from pyrexport.targets.trt import session
from pyrexport.targets.trt.files import engine_file
from support import trt_stand_in
from support.builders import SMALL, resign
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


@pytest.fixture(scope="session")
def cut(shared: Make, engines: Path, networks: Path) -> Path:
    """Folder with `bundle`, `engines` as if its stages were cut into several, and `networks`, those of their parts.

    What their files hold is never read: the stand-in knows them by their hashes.
    """

    def write(folder: Path) -> None:
        bundle, parts = shutil.copytree(engines, folder / "bundle"), shutil.copytree(networks, folder / "networks")
        document = json.loads((bundle / MANIFEST_FILE).read_text())
        for graph in open_bundle(engines).manifest.graphs.values():
            if graph.spec.key.role == STAGE:
                name = graph.spec.name
                network = onnx.load(parts / f"{name}.onnx")
                inferred = ir.from_proto(SymbolicShapeInference.infer_shapes(network))  # knows ONNX Runtime's attention
                form = OnnxForm(name, inferred, {}, parts, (graph.spec,))
                found = cut_network(form, stored_bytes(form) // 3, "--engine-limit")
                for part in found:
                    ir.save(part.model, parts / f"{part.name}.onnx")
                document["graphs"][name]["facts"]["engines"] = len(found)
        for index in range(1, len(found)):
            (bundle / engine_file("stages", index)).write_bytes(b"part %d" % index)
            document["files"][engine_file("stages", index)] = {}
        (bundle / MANIFEST_FILE).write_text(json.dumps(document))
        resign(bundle)

    return shared(["cut"], write)


@contextmanager
def pretended(bundle: Path, networks: Path, cache: Path) -> Iterator[Device]:
    """A pretended GPU that runs the engines of a bundle; a test that leaves anything on it fails."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", trt_stand_in.tensorrt(device, open_bundle(bundle), networks))
        patch.setattr("cuda.bindings.runtime", Runtime(device))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield device
    assert device.leaks == 0
    assert not device.freed_early
    assert not session._Program.opened


@pytest.fixture
def device(engines: Path, networks: Path, tmp_path: Path) -> Iterator[Device]:
    """That runs the engines of `engines`."""
    with pretended(engines, networks, tmp_path / "cache") as device:
        yield device


@pytest.fixture
def device_of_parts(cut: Path, tmp_path: Path) -> Iterator[Device]:
    """That runs those of `cut`."""
    with pretended(cut / "bundle", cut / "networks", tmp_path / "cache") as device:
        yield device
