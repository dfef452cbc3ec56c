"""Engines, built without a GPU."""

import re
import resource

import pytest
from pyrexport.export.bundle.blueprint import LOWERING_FILE, draw
from pyrexport.export.bundle.build import build_bundle
from pyrexport.export.bundle.journal import Journal
from pyrexport.export.bundle.work import make_room, write_weights
from pyrexport.export.lowering.forms import make_forms
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.errors import CheckFailed
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.reporter import Reporter
from pyrexport.targets.cutting import stored_bytes
from pyrexport.targets.facts import find_build_target
from support.building import LEAN, build_options, small_checkpoint

pytest.importorskip("tensorrt_rtx")


def test_a_disk_that_fills_while_an_engine_is_written_leaves_no_bundle(make_checkpoint, tmp_path):
    """TensorRT itself goes on when its writer fails. The engine takes 14 MB; files may grow to 4."""
    checkpoint, target = small_checkpoint(make_checkpoint(*LEAN)), find_build_target("trt")
    options = build_options(checkpoint, target, "bf16", compute_capabilities=["8.9"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        with pytest.raises(CheckFailed, match="cannot grow further"):
            build_bundle(checkpoint, target, tmp_path / "out", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_one_engine_holds_all_stages_with_its_weights_once(make_engines, make_checkpoint):
    """Tiny: what counts is that the engine says so itself; the sizes of real models are in docs/benchmarks.md.

    With 9,408 tokens, whose rotary tables would be larger than the weights if the engine held them.
    """
    options = {"precision": "bf16", "resolution": "81x256x448"}
    bundle = open_bundle(make_engines(*LEAN, **options))
    graphs, stages = bundle.manifest.graphs, [stage_key(index) for index in range(3)]
    assert {key: graph.file for key, graph in graphs.items()} == dict.fromkeys(stages, "stages.engine")
    for key in stages:
        facts = graphs[key].facts
        assert facts["fused_attention"] == facts["attention"] == 4
        assert facts["compute_capabilities"] == ["8.9"]
        assert facts["activation_bytes"] > 0
    stored = graphs[stage_key(0)].facts["weights_bytes"]
    assert stored < 4 * sum(entry.elements for entry in read_checkpoint(make_checkpoint(*LEAN)).transformer.values())
    per_stage = open_bundle(make_engines(*LEAN, **options, layout="per-stage")).manifest.graphs
    assert {graph.file for graph in per_stage.values()} == {"stage0.engine", "stage1.engine", "stage2.engine"}
    assert sum(per_stage[key].facts["weights_bytes"] for key in stages) > 2.5 * stored


def test_the_same_input_gives_the_same_bytes(tiny, tmp_path):
    """The stages in three engines and the decoder's first graph: twice in a process, where a heap is never the same."""
    checkpoint, target = small_checkpoint(tiny), find_build_target("trt")
    options = build_options(checkpoint, target, "bf16", compute_capabilities=["8.6", "12.0"])
    blueprint = draw(checkpoint, target, options)
    make_room(tmp_path, blueprint, lowers=True)
    write_weights(tmp_path, blueprint, Journal(tmp_path, blueprint), Reporter(), lowers=True)
    places, weights = blueprint.files[LOWERING_FILE], tmp_path / LOWERING_FILE
    for name in ("stages", "vae_first"):
        forms = make_forms(target.form, name, blueprint.programs[name], blueprint.dialect, places, weights)
        limit = {"engine_limit": str(stored_bytes(forms[0]) * 2 // 3)} if name == "stages" else {}
        found = []
        for _ in range(2):
            graphs = [spec.name for form in forms for spec in form.graphs]
            lowered = list(target.write_program(name, forms, tmp_path, {**options.target, **limit}))
            assert [lowering.line.partition(":")[0] for lowering in lowered] == graphs
            found.append([(tmp_path / file).read_bytes() for file in lowered[0].files])
        assert len(found[0]) == (3 if limit else 1)
        assert found[0] == found[1]


def test_a_build_whose_attention_is_not_fused_leaves_no_bundle(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.targets.trt.check.ATTENTION_KERNEL", re.compile("never"))
    checkpoint, target = small_checkpoint(make_checkpoint(*LEAN, "--blocks", "1")), find_build_target("trt")
    options = build_options(checkpoint, target, "bf16", compute_capabilities=["8.9"])
    with pytest.raises(CheckFailed, match=r"attention '.*' is fused in 0 of 3 profiles"):
        build_bundle(checkpoint, target, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
