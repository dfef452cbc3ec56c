"""An exported ONNX graph: the same whenever it is made, and nothing of where it was made."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from conftest import ROOT
from onnx import ModelProto
from pyrexport.export.lowering.onnx import export_onnx
from pyrexport.export.weights.source import sources_of
from pyrexport.targets.ort import TARGET as ORT
from pyrexport.targets.trt import TARGET as TRT
from support.graphs import blueprint, graph_of

ABSOLUTE = re.compile(rb"(?<![\w.)\]])/[\w.+-]+/[\w.+/-]+")
"""A path from the root on: two names or more."""

FOREIGN = (b"stack_trace", b"pyrexport.", b"site-packages", b".py", b"class_hierarchy", b"namespace")
"""What the exporter keeps of the program that ran it."""


def test_a_graph_carries_nothing_of_the_machine_that_exported_it(bundle: Path, tiny: Path) -> None:
    """Nor of the code: of repeated blocks, whose functions were inlined, neither."""
    places = [str(path).encode() for path in (ROOT, tiny, bundle, Path.home(), sys.prefix, os.getcwd())]
    files = sorted(bundle.glob("*.onnx"))
    assert len(files) == 6
    for file in files:
        content = file.read_bytes()
        for word in (*FOREIGN, *places):
            assert word not in content, (file.name, word)
        model = onnx.load(file, load_external_data=False)
        assert not ABSOLUTE.search(_without_numbers(model)), file.name
        assert not any(node.metadata_props for node in model.graph.node), file.name
        assert not any(each.doc_string for each in _described(model)), file.name
        assert not model.functions
        assert {entry.value for tensor in model.graph.initializer for entry in _location(tensor)} <= {"weights.bin"}


def _described(model: ModelProto) -> list[Any]:
    """Everything that a description can be hung on."""
    graph = model.graph
    return [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]


def _location(tensor: onnx.TensorProto) -> list[Any]:
    return [entry for entry in tensor.external_data if entry.key == "location"]


def _without_numbers(model: ModelProto) -> bytes:
    """Its bytes but for those of tensors, in which anything may stand by chance."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.ClearField("raw_data")
    return copy.SerializeToString()


@pytest.mark.slow
@pytest.mark.usefixtures("exports_each_time")
@pytest.mark.parametrize(
    ("target", "options", "name"),
    [(ORT, {}, "vae_next"), (TRT, {"layout": "shared"}, "stage0")],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_module_is_exported_twice_with_the_same_bytes(tiny: Path, target: Any, options: Any, name: str) -> None:
    """In one process: its parameters are put back, and keep their sources. 20 s for all."""
    drawn = blueprint(tiny, target, **options)
    graph = graph_of(drawn, name)
    before = {path: id(parameter) for path, parameter in graph.module.named_parameters()}
    first, second = (export_onnx(graph, drawn.dialect, name) for _ in range(2))
    assert _bytes(first.model) == _bytes(second.model)
    assert first.sources == second.sources
    assert set(first.sources) <= set(sources_of(graph.module))
    assert {path: id(parameter) for path, parameter in graph.module.named_parameters()} == before


def _bytes(model: Any) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content
