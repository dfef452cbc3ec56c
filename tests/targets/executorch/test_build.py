"""Building ExecuTorch programs: what they hold, and what is refused or interrupted."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyrexport.export.bundle.blueprint import draw
from pyrexport.export.bundle.build import build_bundle
from pyrexport.export.lowering.program import export_program
from pyrexport.runtime.bundle.engines import Engine, EngineOptions, Facts
from pyrexport.runtime.bundle.graphs import GraphSpec
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.reporter import Reporter
from pyrexport.targets import executorch as package
from pyrexport.targets.dialect import Dialect
from pyrexport.targets.executorch import TARGET
from pyrexport.targets.executorch.dialect import PORTABLE
from pyrexport.targets.facts import BuildTarget
from pyrexport.targets.forms import Lowering, TorchForm
from safetensors.numpy import load_file, save_file
from support.building import LEAN, build_options, small_checkpoint

pytest.importorskip("executorch")
pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.slow
def test_a_plain_model(make_checkpoint, cli, tmp_path):
    """One stage, without text encoder and VAE: about 30 s."""
    checkpoint = make_checkpoint("--kind", "plain", "--no-text-encoder", "--no-vae")
    out = tmp_path / "plain"
    result = cli("build", checkpoint, "--target", "executorch", "-o", out, "--resolution", "17x64x64", "--quiet")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"manifest.json", "stages.pte"}
    assert cli("parity", out, "--reference", checkpoint, "--schedule", "2", "--quiet").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp32", "w4a8"])
def test_blocks_are_lowered_once_whatever_their_weights_share(make_checkpoint, cli, tmp_path, scheme, monkeypatch):
    """Vectors that are the same in all places, and a matrix that is there twice: delegates name weights by content.

    In floating-point numbers, the feed-forward's second product is a sum of two.
    """
    monkeypatch.setattr(PORTABLE, "most_inputs", 64)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--kind", "plain", *LEAN), checkpoint)
    file = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.startswith("blocks.0.") and tensor.ndim == 1:
            tensors[name] = np.full_like(tensor, 0.5 if "norm" in name else 0.0)
    tensors["blocks.0.attn1.to_k.weight"] = tensors["blocks.0.attn1.to_q.weight"].copy()
    tensors["blocks.1.attn2.to_v.weight"] = tensors["blocks.0.attn1.to_q.weight"].copy()
    save_file(tensors, file, metadata={"format": "pt"})
    command = ("build", checkpoint, "--target", "executorch", "-o", tmp_path / "out", "--resolution", "17x64x64")
    result = cli(*command, *(() if scheme == "fp32" else ("--quantize", scheme)))
    assert result.exit_code == 0, result.output
    assert "stage0: 4 delegates of XNNPACK, outside of them nothing" in result.stderr
    how = ("--schedule", "2", "--quiet", "--json")
    proved = cli("parity", tmp_path / "out", "--reference", checkpoint, *how)
    assert proved.exit_code == 0, proved.output
    assert json.loads(proved.stdout)["levels"]["stages"]["relative_l2"] <= (1e-5 if scheme == "fp32" else 5e-2)


def test_lowering_ppf_leaves_nothing_outside(make_checkpoint):
    """Its resize is a product for each axis; the stage takes about 15 s."""
    from pyrexport.targets.executorch.lowering import lower

    checkpoint = small_checkpoint(make_checkpoint("--kind", "ppf", *LEAN))
    blueprint = draw(checkpoint, TARGET, build_options(checkpoint, TARGET))
    graph = next(graph for graph in blueprint.programs["stages"] if graph.module.resize is not None)
    program = export_program(graph.module, graph.spec.inputs)
    for name, value in program.state_dict.items():
        program.state_dict[name] = torch.nn.Parameter(torch.zeros(value.shape), requires_grad=False)
    lowered = lower(graph.spec.name, program)
    targets = {node.target for node in lowered.graph.nodes if node.op == "call_function"}
    assert {str(target) for target in targets} <= {"executorch_call_delegate", "<built-in function getitem>"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp16"), "takes the transformer in fp32 or w8a8-dynamic or w4a8, found fp16"),
        (("--quantize", "text_encoder=w8"), "takes the text_encoder in fp32 or w8a8-dynamic or w4a8, found w8"),
    ],
)
def test_what_it_does_not_store_is_refused(tiny, refused, tmp_path, options, message):
    assert message in refused("build", tiny, "--target", "executorch", "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out.partial").exists()


def test_a_wheel_without_its_dependencies_runs_and_says_that_it_does_not_build(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "pyrexport.targets.executorch.build", raising=False)
    monkeypatch.delattr(package, "build", raising=False)
    monkeypatch.setitem(sys.modules, "executorch.devtools.backend_debug", None)
    with pytest.raises(UsageError, match="enough to run and not to build"):
        TARGET.write_program("stages", [], tmp_path, {})


class Stub(BuildTarget):
    """Takes programs, as executorch does, and stores their weights' sums; fails on the one that it is told to."""

    name = "stub"
    form = TorchForm
    suffix = ".stub"
    schemes = ("fp32",)
    joins_graphs = True
    holds_weights = True

    def __init__(self, fails_on: str = "") -> None:
        self.fails_on, self.written = fails_on, dict[str, list[str]]()

    def engine(self) -> tuple[str, str]:
        return "numpy", np.__version__

    def check_version(self, name: str, version: str) -> None:
        """Any version fits."""

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        raise NotImplementedError

    def dialect(self) -> Dialect:
        return PORTABLE

    def write_program(
        self, name: str, forms: Sequence[TorchForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        if name == self.fails_on:
            raise RuntimeError("stopped")
        self.written[name] = [form.name for form in forms]
        weights = {key: form.program.state_dict[key].sum().item() for form in forms for key in form.placements}
        (folder / f"{name}{self.suffix}").write_text(json.dumps(weights))
        for form in forms:
            yield Lowering(f"{form.name} done")

    def try_graph(self, file: Path, spec: GraphSpec, facts: Facts) -> int | None:
        if spec.name == self.fails_on:
            raise CheckFailed(f"{spec.name} does not run")
        return 1


def test_an_interrupted_build_of_programs_keeps_the_finished_ones(tiny, tmp_path):
    """And no weights that only the build needed are left in the bundle."""
    checkpoint, out = small_checkpoint(tiny), tmp_path / "out"
    options, kept = build_options(checkpoint, Stub()), list[str]()
    reporter = Reporter()
    reporter.kept = kept.append  # type: ignore[method-assign]
    target = Stub(fails_on="vae")
    with pytest.raises(RuntimeError, match="stopped"):
        build_bundle(checkpoint, target, out, options, reporter=reporter)
    assert not out.exists()
    assert target.written == {"stages": ["stage0", "stage1"], "text": ["text_64"]}
    target = Stub(fails_on="vae_next")
    with pytest.raises(CheckFailed, match="vae_next does not run"):
        build_bundle(checkpoint, target, out, options, reporter=reporter)
    assert target.written == {"vae": ["vae_first", "vae_next"]}
    target = Stub()
    build_bundle(checkpoint, target, out, options, reporter=reporter)
    assert target.written == {}, "what was lowered and failed in its run only is kept too"
    assert {graph.memory for graph in open_bundle(out).manifest.graphs.values()} == {1}
    assert {"graph stages", "graph text", "weights of transformer", "weights of text_encoder table"} <= set(kept)
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "stages.stub", "text.stub", "vae.stub", "weights.bin", "tokenizer.json"}
    sums = json.loads((out / "stages.stub").read_text())
    entry = checkpoint.transformer["blocks.0.ffn.net.2.weight"]
    weight = load_file(entry.file)[entry.name].astype(np.float32)
    assert sums["blocks.0.ffn_out.weight"] == pytest.approx(float(weight.sum()), rel=1e-4)  # sums in another order
