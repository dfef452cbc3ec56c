"""Many videos: seeds of each prompt, engines that stay open, and workers on a Ray cluster."""

import json
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from pyrexport.cli import sample
from pyrexport.cli.jobs import Job, claim_folder, unnamed_seed
from pyrexport.cli.reading import Reading
from pyrexport.cli.running import RunOptions, open_worker
from pyrexport.cli.samplers import open_sampler
from pyrexport.cli.videos import VideoOptions
from pyrexport.runtime.bundle.engines import EngineOptions, find_target
from pyrexport.runtime.errors import UsageError

HOW = ("--schedule", "1-1-1", "--threads", "1", "--quiet")


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na red circle\n")
    return file


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*"))}


def test_each_prompt_and_seed_is_a_file(bundle, cli, refused, prompts, tmp_path, monkeypatch):
    target, opened = find_target("ort"), []
    original = target.open_engine
    monkeypatch.setattr(target, "open_engine", lambda file, *rest: opened.append(file) or original(file, *rest))
    out, one = tmp_path / "clips", tmp_path / "one"
    done = cli("sample", bundle, "--prompts", prompts, "--seeds", "0-1,7", "-o", out, *HOW, "--no-cache")
    assert done.exit_code == 0, done.output
    assert len(opened) == len(set(opened))  # each graph once, not once a video
    found = videos(out)
    assert list(found) == [f"{index:04d}-seed{seed}.mp4" for index in range(3) for seed in (0, 1, 7)]
    assert len(set(found.values())) == 9
    *lines, last = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(out / name) for name in found]
    assert re.fullmatch(r"9 made in [\d.]+ s, [\d,]+ an hour", last)
    assert cli("sample", bundle, "--prompts", prompts, "--seeds", "7", "-o", one, *HOW).exit_code == 0
    assert list(videos(one)) == ["0000.mp4", "0001.mp4", "0002.mp4"]  # as with --seed 7
    assert list(videos(one).values()) == [found[f"{index:04d}-seed7.mp4"] for index in range(3)]
    (out / "0001-seed1.mp4").write_bytes(b"")  # what a full disk leaves
    for folder, made, names in ((out, 1, list(found)), (one, 6, [n.replace("-seed7", "") for n in found])):
        arguments = ("sample", bundle, "--prompts", prompts, "--seeds", "0-1,7", "-o", folder, *HOW)
        again = json.loads(cli(*arguments, "--json").stdout)
        assert (again["throughput"]["made"], again["throughput"]["kept"]) == (made, 9 - made)
        assert sorted(videos(folder).values()) == sorted(found.values())
        assert sorted(videos(folder)) == sorted(names)
        for broken in ("", "{", "[]"):
            (folder / "samples.json").write_text(broken)
            assert "nothing tells whose videos lie beside it" in refused(*arguments)


def test_two_that_begin_a_folder_with_one_seed_each(tmp_path):
    """Each would name its files as the other does."""
    assert unnamed_seed(tmp_path, [1]) == 1
    claim_folder(tmp_path, {"seed": 0})
    with pytest.raises(UsageError, match="other prompts or settings"):
        claim_folder(tmp_path, {"seed": 1})
    assert unnamed_seed(tmp_path, [1]) == 0


def test_what_does_not_go_together(bundle, tiny, refused, prompts, tmp_path):
    one = ("sample", bundle, "--prompt", "a", "-o", tmp_path / "a.mp4")
    many = ("sample", bundle, "--prompts", prompts, "-o", tmp_path / "clips")
    assert "--seeds is for --prompts" in refused(*one, "--seeds", "0-4")
    assert "--ray is for --prompts" in refused(*one, "--ray", "local")
    assert "either --seed or --seeds" in refused(*many, "--seeds", "0-4", "--seed", "0")
    assert "--workers is for --ray" in refused(*many, "--workers", "2")
    assert "leave it out with --ray" in refused(*many, "--ray", "local", "--preview", tmp_path / "p.png")
    assert "--ray is for bundles" in refused("sample", tiny, *many[2:], "--ray", "local")
    for seeds in ("", "x", "4-0", "-1", "0-99999999", "1,,2", "1.5", str(2**60)):
        assert "seeds" in refused(*many, f"--seeds={seeds}"), seeds
    assert not (tmp_path / "clips").exists()


def test_without_ray_one_line_says_what_to_install(bundle, refused, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused("sample", bundle, "--prompts", prompts, "-o", tmp_path / "clips", "--ray", "local")
    assert "pip install 'pyrexport[cluster]'" in line
    assert not (tmp_path / "clips").exists()


def test_a_worker_that_sees_another_folder_says_so(bundle, tmp_path):
    """Where folders are not shared, the path may be there and be another folder."""
    opening = partial(open_sampler, bundle, Reading(), EngineOptions(1), resident=True, decoder=None, cache=False)
    job = Job("a cat", tmp_path / "0000.npz", None, None)
    with opening() as here:
        options = RunOptions(bundle, VideoOptions(), None, 1, here.model.schedule("1-1-1"), "", None)
        settings = options.start(here).settings(["a cat"])
    with ExitStack() as stack:
        do = open_worker(stack, opening=opening, options=options, prompts=["a cat"])
        for found in (None, settings | {"identity": "0" * 64}):
            if found is not None:
                (tmp_path / "samples.json").write_text(json.dumps(found))
            with pytest.raises(UsageError, match="is not the folder of this run, or the bundle there is another one"):
                do(job)
        assert not job.output.exists()
        (tmp_path / "samples.json").write_text(json.dumps(settings))
        assert do(job)["files"] == [str(job.output)]
        assert do(job)["kept"]


needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'pyrexport[cluster]'"
)


@needs_ray
def test_a_cluster_that_does_not_answer(bundle, refused, prompts, tmp_path):
    many = ("sample", bundle, "--prompts", prompts, "-o", tmp_path / "clips", "--ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:x", "auto"):
            assert f"no Ray cluster at '{address}'" in refused(*many, address)
    assert "expected the address" in refused(*many, "nonsense")
    assert not (tmp_path / "clips").exists()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_a_node_is_lost_and_no_video_with_it(gpus, bundle, cli, refused, tmp_path, monkeypatch):
    """24 jobs on two nodes, of which one is killed when both have made some. A minute, most of it Ray's processes.

    Where each node has one GPU and a worker takes one, the lost one can only start when the other has ended.
    """
    from ray.cluster_utils import Cluster

    prompts, here, there = tmp_path / "prompts.txt", tmp_path / "here", tmp_path / "there"
    prompts.write_text("\n".join(f"a cat, {number}" for number in range(6)))
    arguments = ("sample", bundle, "--prompts", prompts, "--seeds", "0-3", *HOW)
    assert cli(*arguments, "-o", here).exit_code == 0
    monkeypatch.setattr(type(find_target("ort")), "gpus", lambda self, options: gpus)
    has = {"num_cpus": 1, "num_gpus": gpus}
    nodes = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **has})
    lost: list[int] = []
    workers: set[str] = set()
    said = sample._said
    monkeypatch.setattr(
        sample, "_said", lambda result, *how: workers.add(result.get("worker", "")) or said(result, *how)
    )
    try:
        second = nodes.add_node(**has)

        def lose() -> None:
            while len(workers) < 2 or len(videos(there)) < 6:
                time.sleep(0.05)
            nodes.remove_node(second, allow_graceful=False)
            lost.append(len(videos(there)))

        killer = threading.Thread(target=lose, daemon=True)
        killer.start()
        done = cli(*arguments, "-o", there, "--ray", nodes.address)
        assert done.exit_code == 0, done.output
        killer.join(60)
        again = json.loads(cli(*arguments, "-o", there, "--ray", nodes.address, "--json").stdout)
        (there / "samples.json").unlink()
        assert "choose another folder" in refused(*arguments, "-o", there, "--ray", nodes.address)
    finally:
        nodes.shutdown()
    assert len(lost) == 1
    assert lost[0] < 24  # in the middle
    *lines, last = done.stdout.splitlines()
    assert last.startswith("24 made in ")
    assert sorted(line.split(": ")[0] for line in lines) == [str(there / name) for name in videos(here)]
    # Two, and one in the place of each that was lost: Ray may have placed both on one node.
    assert len({line.rpartition(" on ")[2] for line in lines}) >= 3
    assert videos(there) == videos(here)
    assert again["throughput"]["kept"] == 24
