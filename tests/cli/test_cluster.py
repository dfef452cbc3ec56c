"""`quality` and `calibrate` on a Ray cluster: what they give is what one machine gives."""

import json
import pickle
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from pyrexport.calibration.request import CalibrationRequest, trajectories
from pyrexport.calibration.run import calibrate
from pyrexport.calibration.watching import Watcher
from pyrexport.cli import calibrate as calibrate_command
from pyrexport.cli import comparing
from pyrexport.cli.cluster import Cluster, in_order
from pyrexport.cli.comparing import Comparison
from pyrexport.cli.recording import Recording
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.reporter import Reporter
from support.building import LEAN, small_checkpoint

HOW = ("--threads", "1", "--quiet")
RUNS = ("--prompt", "a cat", "--prompt", "a dog", "--seed", "0", "--seed", "3", "--schedule", "1-1-1", *HOW)
SIZE = ("--resolution", "17x64x64", "--schedule", "1-1-1", "--quiet")


@pytest.fixture
def checkpoint(make_checkpoint) -> Path:
    """Without a text encoder: its embeddings depend on the positions of prompts."""
    return make_checkpoint("--no-text-encoder")


@pytest.fixture
def bundle(make_bundle) -> Path:
    """Of that checkpoint; its figures are far from those of equal videos."""
    return make_bundle("--no-text-encoder", precision="bf16")


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na red circle\n")
    return file


def sent(value):
    """What arrives in another process: as with Ray, arrays are read-only there."""
    buffers: list[pickle.PickleBuffer] = []
    told = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(told, buffers=[buffer.raw().tobytes() for buffer in buffers])


@pytest.fixture
def pretended(monkeypatch):
    """A cluster without Ray: two workers in this process, which give the last item first."""

    @contextmanager
    def connected(cluster, gpus=0):
        def spread(work, items):
            with ExitStack() as stack:
                workers = [sent(work)(stack) for _ in range(2)]
                for number in reversed(range(len(items))):
                    yield number, sent(workers[number % 2](sent(items[number])))

        yield spread if cluster.address else None

    monkeypatch.setattr(Cluster, "connected", connected)


def test_results_are_given_in_order_as_soon_as_they_can_be():
    given = []

    def results():
        for number in (2, 0, 1, 3):
            given.append(number)
            yield number, str(number)

    ordered = in_order(results())
    assert next(ordered) == "0"
    assert given == [2, 0]
    assert list(ordered) == ["1", "2", "3"]


def test_what_does_not_go_together(bundle, checkpoint, refused, prompts, tmp_path, monkeypatch):
    quality = ("quality", bundle, "--reference", checkpoint)
    recipe = ("calibrate", checkpoint, "--prompts", prompts, "-o", tmp_path / "r.safetensors")
    for command in (quality, recipe):
        assert "--workers is for --ray" in refused(*command, "--workers", "2")
    assert "leave it out with --statistics" in refused(*recipe, "--ray", "local", "--statistics", tmp_path / "r")
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (quality, recipe):
        assert "pip install 'pyrexport[cluster]'" in refused(*command, "--ray", "local")
    assert list(tmp_path.iterdir()) == [prompts]


def test_quality_by_workers_is_that_of_one_process(checkpoint, bundle, cli, tmp_path, pretended, monkeypatch):
    """To the last bit, and with the same page."""
    trace = tmp_path / "trace.safetensors"
    recorded = cli("parity", "--record", trace, "--reference", checkpoint, "--resolution", "17x64x64", *RUNS[:-3])
    assert recorded.exit_code == 0, recorded.output
    monkeypatch.chdir(tmp_path)
    for given in (("--reference", checkpoint, *RUNS), ("--trace", trace.name, *HOW)):
        pages = [tmp_path / f"{where}.html" for where in ("here", "there")]
        here = cli("quality", bundle, *given, "--html", pages[0], "--json")
        assert here.exit_code == 0, here.output
        there = cli("quality", bundle, *given, "--html", pages[1], "--json", "--ray", "pretended")
        assert there.exit_code == 0, there.output
        assert len(json.loads(here.stdout)["runs"]) == 4
        assert there.stdout == here.stdout
        assert pages[1].read_text() == pages[0].read_text()


@pytest.mark.parametrize("methods", [("w8a8",), ("w8a8", "vae=w8a8")], ids=["transformer", "with the decoder"])
def test_a_recipe_by_workers_is_that_of_one_process(methods, tiny, make_checkpoint, cli, prompts, tmp_path, pretended):
    checkpoint = tiny if len(methods) > 1 else make_checkpoint(*LEAN)
    asked = [word for method in methods for word in ("--quantize", method)]
    recipes = [tmp_path / f"{where}.safetensors" for where in ("here", "there")]
    for recipe, where in zip(recipes, ((), ("--ray", "pretended")), strict=True):
        done = cli("calibrate", checkpoint, "--prompts", prompts, *SIZE, *asked, "-o", recipe, *where)
        assert done.exit_code == 0, done.output
    assert recipes[0].read_bytes() == recipes[1].read_bytes()


def test_prompts_that_were_done_elsewhere_are_kept(make_checkpoint, tmp_path):
    """A cluster that is lost after the first prompt; the rest is done here, to the same recipe."""
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    asked = CalibrationRequest(("a", "b", "c"), checkpoint.model.schedule("1-1-1"))
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    calibrate(checkpoint, whole, asked)

    def lost(run, prompts):
        yield Watcher(Reference(checkpoint), asked, run, Reporter()).watch(prompts[0])
        raise ConnectionError

    with pytest.raises(ConnectionError) as stopped:
        calibrate(checkpoint, parts, asked, elsewhere=lost)
    assert ["keeps the prompts that were done" in note for note in stopped.value.__notes__] == [True]
    assert not parts.exists()
    calibrate(checkpoint, parts, asked)
    assert parts.read_bytes() == whole.read_bytes()


def test_a_worker_that_sees_other_files_says_so(bundle, checkpoint, make_checkpoint):
    comparison = Comparison(bundle, checkpoint, (), Recording(), EngineOptions(1))
    with comparison.open() as pipeline:
        facts = comparison.facts(pipeline)
    assert set(facts) == {str(bundle), str(checkpoint)}
    lean = small_checkpoint(make_checkpoint(*LEAN))
    request = CalibrationRequest(("a",), lean.model.schedule("1-1-1"))
    other = trajectories(lean, CalibrationRequest(("a",), request.schedule, seed=1))
    with ExitStack() as stack:
        for path in facts:
            with pytest.raises(UsageError, match=rf"^{path} on .* differ from those of this run"):
                comparing.open_worker(stack, comparison=comparison, facts=facts | {path: "0" * 64}, threads=1)
        opening = partial(small_checkpoint, lean.folder)
        with pytest.raises(UsageError, match=r"^seed on .* differ from those of this run"):
            calibrate_command.open_worker(stack, opening=opening, request=request, run=other, threads=1)


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'pyrexport[cluster]'")
@pytest.mark.slow
def test_a_node_is_lost_and_nothing_with_it(bundle, checkpoint, cli, prompts, tmp_path, monkeypatch):
    """Runs and prompts on two nodes, of which one is killed when some are done. Two minutes, most of them Ray's."""
    from ray.cluster_utils import Cluster as Nodes

    prompts.write_text("\n".join(f"a cat, {number}" for number in range(8)))
    quality = ("quality", bundle, "--reference", checkpoint, "--prompts", prompts, *RUNS[4:], "--json")
    recipe = ("calibrate", checkpoint, "--prompts", prompts, *SIZE, "-o")
    here = cli(*quality).stdout, cli(*recipe, tmp_path / "here.safetensors")
    head = {"include_dashboard": False, "num_cpus": 1}
    for module, command in ((comparing, quality), (calibrate_command, (*recipe, tmp_path / "there.safetensors"))):
        nodes, come, left = Nodes(initialize_head=True, head_node_args=head), [], []
        second = nodes.add_node(num_cpus=1)

        def counted(results, come=come):
            return in_order(come.append(number) or (number, result) for number, result in results)

        def lose(nodes=nodes, second=second, come=come, left=left):
            while len(come) < 3:
                time.sleep(0.05)
            nodes.remove_node(second, allow_graceful=False)
            left.append(len(come))

        monkeypatch.setattr(module, "in_order", counted)
        killer = threading.Thread(target=lose, daemon=True)
        killer.start()
        try:
            there = cli(*command, "--ray", nodes.address)
            killer.join(60)
        finally:
            nodes.shutdown()
        assert there.exit_code == 0, there.output
        assert left[0] < len(come)  # in the middle
        assert sorted(come) == list(range(len(come)))  # none twice
        if module is comparing:
            assert there.stdout == here[0]
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
