"""A bundle whose files are links, as the hub's cache lays it."""

from pathlib import Path

import numpy as np
import pytest
from pyrexport.export.proof.bisect import first_divergence
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.pipeline.pipeline import load
from pyrexport.runtime.proof.trace import Trace
from support.hub import lay_in_cache


@pytest.fixture(scope="module")
def linked(bundle, tmp_path_factory) -> Path:
    """A snapshot: links into `blobs/`."""
    return lay_in_cache(bundle, tmp_path_factory.mktemp("home"), "org/bundle")


def test_it_samples_what_the_bundle_samples(bundle, linked, cli, tmp_path):
    for folder, name in ((bundle, "plain.npy"), (linked, "linked.npy")):
        result = cli("sample", folder, "--prompt", "a", "-o", tmp_path / name, "--schedule", "1-1-1", "--quiet")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "linked.npy").read_bytes()


def test_it_passes_parity_and_can_be_bisected(tiny, linked, cli, tmp_path):
    options = ("--schedule", "1-1-1", "--no-decode", "--quiet", "--record", tmp_path / "trace.safetensors")
    assert cli("parity", linked, "--reference", tiny, *options).exit_code == 0
    with load(linked) as pipeline:
        checkpoint = read_checkpoint(tiny, resolution=pipeline.bundle.manifest.resolution)
        found = first_divergence(pipeline, checkpoint, Trace(tmp_path / "trace.safetensors"), 0)
    assert found["first"] is None
    assert len(found["relative_l2"]) > 2


def test_its_weights_are_mapped_from_where_they_lie(linked):
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc here")
    with load(linked) as pipeline:
        pipeline.open(stage_key(0))
        assert str((linked / "weights.bin").resolve()) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("only", ["weights.bin", "stage0.onnx"])
def test_one_file_on_another_disk_is_as_good_as_all(copy, bundle, tmp_path, only):
    """A link of the user's own, to a file of another name in another folder."""
    (tmp_path / "disk").mkdir()
    (copy / only).rename(tmp_path / "disk" / "big file")
    (copy / only).symlink_to(tmp_path / "disk" / "big file")
    with load(bundle) as plain, load(copy) as pipeline:
        specs = pipeline.open(stage_key(0)).spec.inputs  # type: ignore[attr-defined]
        inputs = {spec.name: np.ones(spec.shape, spec.dtype) for spec in specs}
        expected = plain.run(stage_key(0), inputs)["velocity"]
        assert np.array_equal(pipeline.run(stage_key(0), inputs)["velocity"], expected)
