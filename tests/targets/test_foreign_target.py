"""A target of somebody else: a package of its own, of which pyrexport holds no line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "plainly"
version = "1.2"

[project.entry-points."pyrexport.targets"]
plainly = "plainly:TARGET"

[tool.setuptools]
packages = ["plainly"]
"""

INIT = '''
"""Bundles that the evaluator of the onnx package runs."""

from importlib.metadata import version

import numpy as np
from pyrexport.runtime.bundle.engines import Option, at_least, check_inputs
from pyrexport.runtime.errors import UsageError
from pyrexport.targets.facts import BuildTarget
from pyrexport.targets.forms import Lowering


class Plainly(BuildTarget):
    name = "plainly"
    suffix = ".onnx"
    schemes = ("fp32",)
    build_options = (Option("colour", "--colour", "Of nothing.", choices=("red", "blue")),)
    engine_options = (Option("chatty", "--chatty", "Say what is evaluated.", switch=True),)

    def engine(self):
        return "onnx", version("onnx")

    def check_version(self, name, version):
        at_least("onnx", (name, version))

    def resolve_options(self, given):
        return {"colour": super().resolve_options(given)["colour"] or "red"}

    def dialect(self):
        from .dialect import PLAIN

        return PLAIN

    def write_program(self, name, forms, folder, options):
        import onnx_ir
        from pyrexport.targets.external import refer

        (form,) = forms
        refer(form.model, form.placements, form.weights)
        onnx_ir.save(form.model, folder / f"{name}{self.suffix}")
        kinds = sorted({node.op_type for node in form.model.graph})
        yield Lowering(f"{name}: {len(kinds)} kinds of operators", {"operators": kinds, "colour": options["colour"]})

    def check_facts(self, facts):
        facts.get("operators", "a list of names", lambda v: isinstance(v, list))

    def open_engine(self, file, spec, facts, options):
        return Evaluator(file, spec)


class Evaluator:
    def __init__(self, file, spec):
        import onnx
        from onnx.reference import ReferenceEvaluator

        self.spec, self.evaluator = spec, ReferenceEvaluator(onnx.load(file))

    def run(self, inputs):
        check_inputs(self.spec.inputs, inputs)
        values = self.evaluator.run(None, dict(inputs))
        return {tensor.name: np.asarray(v, tensor.dtype) for tensor, v in zip(self.spec.outputs, values, strict=True)}

    def close(self):
        pass


TARGET = Plainly()
'''

DIALECT = '''
"""An attention and a GELU of its own, as operators of the ONNX standard."""

import torch
from onnxscript import opset23
from pyrexport.targets.dialect import Dialect


@torch.library.custom_op("plainly::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@attend.register_fake
def _(query, key, value, heads):
    return torch.empty_like(query)


def attention(query, key, value, heads):
    out, *_ = opset23.Attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)
    return out


class Plain(Dialect):
    operators = {torch.ops.plainly.attend.default: attention}
    transposed = True

    def attention(self, query, key, value, heads):
        return attend(query, key, value, heads)


PLAIN = Plain()
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed, with pip, beside pyrexport."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "plainly").mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "plainly" / "__init__.py").write_text(INIT)
    (source / "plainly" / "dialect.py").write_text(DIALECT)
    how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(source)], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(site)}


def run(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "pyrexport.cli", *(str(a) for a in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_it_builds_samples_and_passes_parity(installed: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    """From the command line, with its own dialect, operators, options and session; about 60 s."""
    out = tmp_path / "plain.pyrx"
    small = ("--resolution", "17x64x64", "--quiet")
    run(installed, "build", tiny, "--target", "plainly", "--colour", "blue", "-o", out, *small)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["target"], manifest["engine"]["name"]) == ("plainly", "onnx")
    assert manifest["target_options"] == {"colour": "blue"}
    assert "Attention" in manifest["graphs"]["stage0"]["facts"]["operators"]
    clip = tmp_path / "clip.npz"
    run(installed, "sample", out, "--prompt", "a cat", "--schedule", "1-1-1", "-o", clip, "--chatty", "--quiet")
    assert clip.is_file()
    how = ("--prompt", "a cat", "--schedule", "1-1-1", "--json", "--quiet")
    result = json.loads(run(installed, "parity", out, "--reference", tiny, *how))
    assert result["passed"] is True
    assert set(result["levels"]) == {"text", "stages", "chain", "vae", "video"}
    assert max(level["relative_l2"] for name, level in result["levels"].items() if name != "video") < 1e-5
    assert json.loads(run(installed, "inspect", out, "--json"))["facts"]["stage0"]["colour"] == "blue"
