"""Nothing that was sampled is lost: latents are there before they are decoded, and `decode` goes on from them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from pyrexport.cli.reading import Reading
from pyrexport.cli.samplers import open_sampler
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import CheckFailed
from pyrexport.runtime.pipeline.latents import Origin, checkpoint_of, origin_file, read_origin, save_latents
from support.builders import resign

HOW = ("--prompt", "a cat", "--schedule", "1-1-1", "--quiet")
SHAPE = (16, 5, 8, 8)  # of the tiny bundle's latents, at 17x64x64

# Ends its own process, as the kernel does where memory is short, once a frame has been decoded.
KILLED = """
import os, signal, sys
from pyrexport.cli import main, samplers
from pyrexport.runtime.pipeline.decoder import frames_from

def fatal(video, calls=[]):
    calls.append(video)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return frames_from(video)

samplers.frames_from = fatal
main(sys.argv[1:])
"""


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)`: decoding raises it after the first frames; `failing(None)`: it goes well again."""

    def fail(error):
        def frames(video, calls=[0]):  # noqa: B006
            calls[0] += 1
            if error is not None and calls[0] == 2:
                raise error
            return original(video)

        monkeypatch.setattr("pyrexport.cli.samplers.frames_from", frames)

    from pyrexport.cli.samplers import frames_from as original

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_process_killed_while_it_decodes_loses_nothing(bundle, cli, tmp_path):
    """Its latents are decoded by another process to the very bytes of a run that was not killed."""
    whole, killed, again = (tmp_path / name for name in ("whole.npz", "killed.npz", "again.npz"))
    assert cli("sample", bundle, *HOW, "-o", whole).exit_code == 0
    command = [sys.executable, "-c", KILLED, "sample", str(bundle), *HOW, "--threads", "1", "-o", str(killed)]
    assert subprocess.run(command, check=False, cwd=ROOT, env=os.environ).returncode == -signal.SIGKILL
    left = tmp_path / "killed.npz.latents.npy"
    assert {left.name, origin_file(left).name} <= set(names(tmp_path))
    assert not killed.exists()
    assert cli("decode", bundle, left, "-o", again, "--quiet").exit_code == 0
    assert again.read_bytes() == whole.read_bytes()
    assert cli("sample", bundle, *HOW, "-o", killed).exit_code == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert not left.exists()


def test_a_decode_that_fails_says_where_the_latents_are_and_how_to_go_on(bundle, cli, tmp_path, failing):
    failing(CheckFailed("no memory is left"))
    out = tmp_path / "a b.mp4"
    result = cli("sample", bundle, *HOW, "-o", out, "--fps", 8, "--grid")
    (line,) = result.stderr.splitlines()
    left = tmp_path / "a b.mp4.latents.npy"
    assert (result.exit_code, names(tmp_path)) == (1, [left.name, origin_file(left).name])
    assert line.startswith(f"Error: no memory is left; the latents are in {left}: go on with 'pyrexport decode ")
    failing(None)
    arguments = shlex.split(line[line.index("pyrexport decode") : -1])[1:]
    done = cli(*arguments, "--quiet")
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["a b.mp4", "a b.mp4.latents.npy", "a b.mp4.latents.npy.json", "a b.png"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left", "a.mp4"), 1)])
def test_so_does_one_that_is_interrupted_or_has_no_space(bundle, cli, tmp_path, failing, error, code):
    failing(error)
    result = cli("sample", bundle, *HOW, "-o", tmp_path / "a.npz", "--save-latents", tmp_path / "l.npy")
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code == code
    assert f"the latents are in {tmp_path / 'l.npy'}: go on with" in line
    assert names(tmp_path) == ["l.npy", "l.npy.json"]


def test_the_same_command_goes_on_and_another_does_not_write_over_them(bundle, cli, refused, tmp_path, failing):
    failing(CheckFailed("no memory is left"))
    arguments = ("sample", bundle, *HOW, "-o", tmp_path / "a.npz")
    assert cli(*arguments).exit_code == 1
    failing(None)
    before = (tmp_path / "a.npz.latents.npy").read_bytes()
    line = refused(*arguments, "--seed", 1)
    assert "holds latents of another run that was stopped: go on with 'pyrexport decode" in line
    assert (tmp_path / "a.npz.latents.npy").read_bytes() == before
    assert cli(*arguments).exit_code == 0
    assert names(tmp_path) == ["a.npz"]


def test_latents_of_a_model_of_other_facts_and_the_same_graphs_are_of_another_run(
    copy, cli, refused, tmp_path, failing
):
    failing(CheckFailed("no memory is left"))
    arguments = ("sample", copy, *HOW, "-o", tmp_path / "a.npz")
    assert cli(*arguments).exit_code == 1
    failing(None)
    document = json.loads((copy / "manifest.json").read_text())
    resign(copy, model=document["model"] | {"wavelet": "db2"})
    assert "holds latents of another run" in refused(*arguments)
    resign(copy, model=document["model"], provenance=document["provenance"] | {"note": "built on another day"})
    assert cli(*arguments).exit_code == 0


def test_so_are_those_of_a_checkpoint(tiny, tmp_path):
    def identity(folder: Path) -> str:
        with open_sampler(folder, Reading(), EngineOptions(1), resident=False, decoder=None, cache=False) as sampler:
            return sampler.identity

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    assert identity(folder) == identity(tiny)
    for name, fields in (("pyramid.json", {"wavelet": "db2"}), ("vae/config.json", {"latents_mean": [0.5] * 16})):
        before, whole = identity(folder), (folder / name).read_text()
        (folder / name).write_text(json.dumps(json.loads(whole) | fields))
        assert identity(folder) != before, name


def test_a_run_over_many_prompts_goes_on_from_latents(bundle, cli, tmp_path, failing, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a cat\na dog\n")
    arguments = ("sample", bundle, "--prompts", prompts, "-o", out, "--schedule", "1-1-1", "--quiet")
    failing(CheckFailed("no memory is left"))
    assert cli(*arguments).exit_code == 1
    failing(None)
    assert names(out) == ["0000.mp4.latents.npy", "0000.mp4.latents.npy.json", "samples.json"]
    sampled = []
    from pyrexport.cli.samplers import BundleSampler

    original = BundleSampler.latents
    monkeypatch.setattr(
        BundleSampler, "latents", lambda self, prompt, *rest: sampled.append(prompt) or original(self, prompt, *rest)
    )
    assert cli(*arguments).exit_code == 0
    assert sampled == ["a dog"]
    assert names(out) == ["0000.mp4", "0001.mp4", "samples.json"]


def test_latents_are_decoded_as_they_were_sampled(bundle, cli, tmp_path):
    """The file of latents is float32 for anybody to read, and what it was sampled with lies beside it."""
    sampled = cli("sample", bundle, *HOW, "-o", tmp_path / "a.npz", "--save-latents", tmp_path / "a.npy")
    assert sampled.exit_code == 0, sampled.output
    latents, origin = np.load(tmp_path / "a.npy"), read_origin(tmp_path / "a.npy")
    assert (latents.dtype, latents.shape) == (np.float32, SHAPE)
    assert origin is not None
    assert origin.resolution == Resolution(17, 64, 64)
    assert {"prompt": "a cat", "seed": 0, "schedule": "1-1-1"}.items() <= origin.run.items()
    frames = np.load(tmp_path / "a.npz")["frames"]
    done = cli("decode", bundle, tmp_path / "a.npy", "-o", tmp_path / "frames", "--grid", "--json", "--quiet")
    document = json.loads(done.stdout)
    assert document["files"] == [str(tmp_path / "frames"), str(tmp_path / "frames.png")]
    assert document["run"]["prompt"] == "a cat"
    assert len(names(tmp_path / "frames")) == len(frames) == 17
    rate = ("--fps", 24, "--crf", 30)
    assert cli("decode", bundle, tmp_path / "a.npy", "-o", tmp_path / "a.mp4", *rate, "--quiet").exit_code == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 24
        assert container.streams.video[0].frames == 17


def test_a_video_has_the_models_own_frame_rate(bundle, cli, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, np.float32))  # nothing beside it: its shape is all that is known
    done = cli("decode", bundle, tmp_path / "a.npy", "-o", tmp_path / "a.mp4", "--quiet")
    assert done.exit_code == 0, done.output
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing: expected latents as .npy"),
        (b"", "found another kind of file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (b"\x93NUMPY\x01\x00", "is malformed"),
        (np.zeros(SHAPE, np.float32)[None], "expected floats of shape [16, 5, 8, 8], found float32 [1, 16, 5, 8, 8]"),
        (np.zeros((16, 5, 8, 9), np.float32), "latents [C, T, H, W] at 17x64x64: expected floats of shape"),
        (np.zeros(SHAPE, np.int32), "found int32"),
        (np.array([{}]), "is malformed"),
    ],
)
def test_what_are_no_latents_is_refused(bundle, refused, tmp_path, content, words):
    file = tmp_path / "a.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    assert words in refused("decode", bundle, file, "-o", tmp_path / "x.mp4", "--quiet")
    assert not (tmp_path / "x.mp4").exists()


def test_latents_that_are_cut_or_not_finite_are_refused(bundle, cli, refused, tmp_path):
    file = tmp_path / "a.npy"
    np.save(file, np.full(SHAPE, np.nan, np.float32))
    result = cli("decode", bundle, file, "-o", tmp_path / "x.npz", "--quiet")
    assert result.exit_code == 1
    assert "are not finite" in result.stderr
    file.write_bytes(file.read_bytes()[:-1])
    assert "is malformed" in refused("decode", bundle, file, "-o", tmp_path / "x.npz", "--quiet")


def test_latents_of_another_model_or_size_are_refused(bundle, make_bundle, cli, refused, tmp_path):
    """A bundle of the same checkpoint, stored in another precision, is the same model."""
    file = tmp_path / "a.npy"
    latents = np.zeros(SHAPE, np.float32)
    arguments = (file, "-o", tmp_path / "x.npz", "--quiet")
    save_latents(file, latents, Origin("0" * 64, Resolution(17, 64, 64), {}))
    line = refused("decode", bundle, *arguments)
    assert "expected latents of the bundle's model (" in line
    assert (
        f"found those of another (0000000000000000…); decode with the bundle that they are of, or remove {file}" in line
    )
    save_latents(file, latents, Origin(None, Resolution(17, 64, 128), {}))
    assert "expected latents at 17x64x64, found 17x64x128" in refused("decode", bundle, *arguments)
    assert cli("sample", make_bundle(precision="bf16"), *HOW, "-o", file).exit_code == 0
    assert cli("decode", bundle, *arguments).exit_code == 0


def test_what_lies_beside_latents_is_read_again_as_it_was(bundle, tmp_path):
    from pyrexport.runtime.bundle.opening import open_bundle

    checkpoint = checkpoint_of(open_bundle(bundle).manifest)
    assert checkpoint is not None
    origin = Origin(checkpoint, Resolution(17, 64, 64), {"prompt": "ä\ud800", "levels": [[1.0, 0.1 + 0.2]]})
    save_latents(tmp_path / "a.npy", np.zeros(SHAPE, np.float32), origin)
    assert read_origin(tmp_path / "a.npy") == origin
    assert Origin.from_json(origin.to_json(), "again") == origin


@pytest.mark.parametrize(
    ("text", "words"), [("{", "malformed"), ("{}", "'format' is missing"), ('{"a": 1}', "unknown field 'a'")]
)
def test_a_damaged_file_beside_latents_is_refused(bundle, refused, tmp_path, text, words):
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, np.float32))
    (tmp_path / "a.npy.json").write_text(text)
    assert words in refused("decode", bundle, tmp_path / "a.npy", "-o", tmp_path / "x.npz", "--quiet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "x.npy"], "expected an output that ends in .mp4 or .npz, or a folder for PNG"),
        (["-o", "x.npz", "--fps", "8", "--crf", "3"], "'x.npz' is no .mp4: leave out --fps, --crf"),
        (["-o", "x.mp4", "--fps", "0"], "0"),
        (["-o", "x.mp4", "--crf", "52"], "52"),
        (["-o", "no/x.mp4"], "does not exist"),
    ],
)
def test_outputs_that_cannot_be(bundle, refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("decode", bundle, "a.npy", *arguments)
    assert names(tmp_path) == []


def test_what_is_no_bundle_is_refused(tiny, refused, tmp_path):
    assert "is not a bundle" in refused("decode", tiny, tmp_path / "a.npy", "-o", tmp_path / "x.npz")


def test_latents_of_nobody_knows_which_model_are_decoded_with_a_warning(bundle, cli, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, np.float32))
    done = cli("decode", bundle, tmp_path / "a.npy", "-o", tmp_path / "x.npz", "--quiet")
    assert done.exit_code == 0
    assert "may be another model's: nothing beside it (a.npy.json) says which" in done.stderr
    assert (tmp_path / "a.npy").exists()


def test_latents_of_a_checkpoint_say_which(tiny, bundle, make_checkpoint, cli, refused, tmp_path):
    """Of the checkpoint itself they are decoded by its bundle, of another they are refused."""
    other = make_checkpoint("--seed", "3")
    for index, checkpoint in enumerate((tiny, other)):
        run = ("sample", checkpoint, *HOW, "--resolution", "17x64x64", "-o", tmp_path / f"{index}.npy")
        assert cli(*run).exit_code == 0
    assert cli("decode", bundle, tmp_path / "0.npy", "-o", tmp_path / "0.npz", "--quiet").exit_code == 0
    assert "found those of another" in refused("decode", bundle, tmp_path / "1.npy", "-o", tmp_path / "1.npz")


def test_a_frame_rate_that_is_no_number_is_refused(bundle, cli, tmp_path):
    result = cli("sample", bundle, *HOW, "-o", tmp_path / "x.mp4", "--fps", "nan")
    assert (result.exit_code, "is not a number" in result.stderr) == (2, True)
