"""Graphs that are cut into several contexts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyrexport
import pytest
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.targets.qnn import build
from pyrexport.targets.qnn.target import Qnn
from support.builders import resign

pytest.importorskip("onnxruntime_qnn")

CHIP = ("--soc", "sm8750")
LIMITS = {1: "1000000", 2: "150000", 3: "120000"}
"""Bytes of weights in a context, of 238 KB in a stage: what cuts it into so many."""


def limited(count: int) -> tuple[str, ...]:
    return (*CHIP, "--context-limit", LIMITS[count])


@pytest.fixture(scope="session")
def lean(make_checkpoint) -> Path:
    """One stage of one block, alone."""
    return make_checkpoint(
        "--blocks", "1", "--stages", "1", "--no-vae", "--no-text-encoder", "--resolution", "17x64x64"
    )


@pytest.fixture
def cut(make, lean, tmp_path) -> Path:
    """A bundle of two contexts, to be changed."""
    return Path(shutil.copytree(make(*limited(2), of=lean), tmp_path / "bundle"))


def velocity(bundle: Path) -> np.ndarray:
    draw = np.random.default_rng(0)
    with pyrexport.load(bundle) as pipeline:
        spec = pipeline.bundle.manifest.graphs[stage_key(0)].spec
        inputs = {tensor.name: draw.standard_normal(tensor.shape, np.float32) for tensor in spec.inputs}
        return pipeline.run(stage_key(0), inputs)["velocity"]


@pytest.mark.parametrize("count", [2, 3])
def test_contexts_in_turn_compute_what_one_does(make, lean, count):
    """To the last bit: what crosses are 16-bit numbers, which float32 holds."""
    whole, parts = (make(*limited(n), of=lean) for n in (1, count))
    names = {"stage0.sm8750.bin", *(f"stage0-{index}.sm8750.bin" for index in range(2, count + 1))}
    assert {path.name for path in parts.glob("*.bin")} == names
    np.testing.assert_array_equal(velocity(parts), velocity(whole))


def test_contexts_in_turn_pass_parity(make, lean, cli):
    found = [
        cli("parity", make(*limited(count), of=lean), "--reference", lean, "--schedule", "1", "--json", "--quiet")
        for count in (1, 2)
    ]
    assert [result.exit_code for result in found] == [0, 0], found[1].output
    whole, parts = (json.loads(result.stdout)["levels"]["stages"]["relative_l2"] for result in found)
    assert 5e-4 < parts == whole <= 5e-3


def test_the_contexts_are_told_of_before_and_after(make, lean, cli, monkeypatch, tmp_path):
    """Before: what they hold of weights, and nothing is compiled. The compiler adds what it does for a graph."""
    bundle = make(*limited(2), of=lean)
    with monkeypatch.context() as patched:
        patched.setattr(build, "_compile", lambda *arguments: pytest.fail("compiled"))
        planned = cli("build", lean, "--target", "qnn", *limited(2), "--plan", "--json", "--quiet")
    assert planned.exit_code == 0, planned.output
    expected = json.loads(planned.stdout)["files"]
    assert set(expected) == {path.name for path in bundle.glob("*.bin")}
    assert all(nbytes <= 150_000 for nbytes in expected.values())
    assert all(nbytes < (bundle / name).stat().st_size < nbytes + 300_000 for name, nbytes in expected.items())
    assert not list(tmp_path.iterdir())
    assert "its own, in 2 contexts" in cli("inspect", bundle).stdout


def test_a_context_that_is_missing_is_refused(cut, lean, cli):
    (cut / "stage0-2.sm8750.bin").unlink()
    found = cli("parity", cut, "--reference", lean, "--schedule", "1", "--quiet")
    assert found.exit_code == 1
    assert "stage0-2.sm8750.bin is missing" in found.stderr


def test_contexts_that_were_exchanged_are_refused(cut, lean, cli, refused):
    one, other = cut / "stage0.sm8750.bin", cut / "stage0-2.sm8750.bin"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    command = ("parity", cut, "--reference", lean, "--schedule", "1", "--quiet")
    assert cli(*command).exit_code == 1
    resign(cut)
    assert "stage0.sm8750.bin is not the context of stage0 for sm8750" in refused(*command)


def test_a_rerun_keeps_the_contexts(lean, cli, monkeypatch, tmp_path):
    """And nothing of a build that cut its graphs otherwise."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "bundle"
    command = ("build", lean, "--target", "qnn", *limited(2), "-o", out, "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(Qnn, "try_graph", stop)
        assert cli(*command).exit_code == 130
    (tmp_path / "bundle.partial" / "stage0-3.sm8750.bin").touch()
    monkeypatch.setattr(build, "_compile", lambda *arguments: pytest.fail("compiled again"))
    result = cli(*command)
    assert result.exit_code == 0, result.output
    files = {"manifest.json", "stage0.sm8750.onnx", "stage0.sm8750.bin", "stage0-2.sm8750.bin"}
    assert {path.name for path in out.iterdir()} == files
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == files - {"manifest.json"}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("0", "--context-limit: expected a number of bytes such as 1100000000, found '0'"),
        ("2GB", "--context-limit: expected a number of bytes such as 1100000000, found '2GB'"),
        ("1000", "cannot be cut into parts of at most 1,000 bytes of weights: expected a --context-limit of"),
    ],
)
def test_limits_that_are_none(lean, refused, tmp_path, limit, message):
    words = ("build", lean, "--target", "qnn", *CHIP, "--context-limit", limit, "--quiet", "--plan")
    assert message in refused(*words)
