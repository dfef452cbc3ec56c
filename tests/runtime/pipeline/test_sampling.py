"""A bundle is sampled, in Python and on the command line."""

import json
import shutil

import numpy as np
import pyrexport
import pytest
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.bundle.manifest import signed
from pyrexport.runtime.errors import PyrexportError, UsageError
from pyrexport.runtime.proof.metrics import distance
from support.builders import resign


def test_sampling_a_bundle_equals_the_reference(bundle, tiny, cli, tmp_path):
    for model, name in ((bundle, "ours.npy"), (tiny, "theirs.npy")):
        result = cli(
            "sample", model, "--prompt", "  a &amp;amp; b\n cat ", "-o", tmp_path / name, "--seed", 3, "--quiet"
        )
        assert result.exit_code == 0, result.output
    ours, theirs = (np.load(tmp_path / name) for name in ("ours.npy", "theirs.npy"))
    assert distance(ours, theirs).relative_l2 < 1e-5  # two blocks: far below the tolerance of 1e-4


def test_the_api_and_the_command_line_agree(bundle, cli, tmp_path):
    steps = []
    with pyrexport.load(bundle, resident=True) as pipeline:
        result = pipeline("a cat", seed=1, schedule="1-1-1", callback=steps.append)
        latent_only = pipeline("a cat", seed=1, schedule="1-1-1", output_type="latent")
        embeds = pipeline(prompt_embeds=pipeline.encode("a cat"), seed=1, schedule="1-1-1", output_type="latent")
    assert [step.plan.stage.index for step in steps] == [2, 1, 0]
    assert result.frames.shape == (17, 64, 64, 3)
    assert latent_only.frames is None
    assert np.array_equal(result.latents, latent_only.latents)
    assert np.array_equal(result.latents, embeds.latents)
    assert result.timings.denoise <= result.timings.total
    out = tmp_path / "a.npz"
    arguments = [
        "--seed",
        1,
        "--schedule",
        "1-1-1",
        "--save-latents",
        tmp_path / "a.npy",
        "--grid",
        "--quiet",
        "--json",
    ]
    done = cli("sample", bundle, "--prompt", "a cat", "-o", out, *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == [str(out), str(tmp_path / "a.png"), str(tmp_path / "a.npy")]
    assert np.array_equal(np.load(out)["frames"], result.frames)
    assert np.array_equal(np.load(tmp_path / "a.npy"), result.latents)


def test_a_file_of_prompts_goes_on_where_it_stopped(bundle, cli, refused, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    out = tmp_path / "clips"
    arguments = ["sample", bundle, "--prompts", prompts, "-o", out, "--schedule", "1-1-1", "--quiet", "--json"]
    assert len(json.loads(cli(*arguments).stdout)["samples"]) == 2
    kept = (out / "0000.mp4").stat().st_mtime_ns
    (out / "0001.mp4").unlink()
    samples = json.loads(cli(*arguments).stdout)["samples"]
    assert [(sample["prompt"], sample.get("kept", False)) for sample in samples] == [("a cat", True), ("a dog", False)]
    assert (out / "0000.mp4").stat().st_mtime_ns == kept
    assert "other prompts or settings" in refused(*arguments, "--negative-prompt", "a bird")
    prompts.write_bytes("\ufeffa cat\n\na dog\n".encode())  # some editors put a mark at the start
    assert all(sample["kept"] for sample in json.loads(cli(*arguments).stdout)["samples"])
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    resign(other)
    moved = json.loads((out / "samples.json").read_text()) | {"model": str(other.resolve())}
    (out / "samples.json").write_text(json.dumps(moved | {"weights": "0" * 64}))
    assert "other prompts or settings" in refused("sample", other, *arguments[2:])


def test_without_pyav_frames_go_elsewhere(bundle, cli, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrexport.cli.jobs.has_video_writer", lambda: False)
    line = refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "a.mp4")
    assert "pip install 'pyrexport[video]', or give a folder for PNG files or a .npz" in line
    assert cli("sample", bundle, "--prompt", "a", "-o", tmp_path / "frames", "--quiet").exit_code == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 17
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "frames" / "00000.png").write_text("precious")
    assert "is not empty" in refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "frames")
    assert (tmp_path / "frames" / "00000.png").read_text() == "precious"


def test_one_engine_is_open_at_a_time_unless_resident(bundle):
    """After the last step, a resident pipeline has the text encoder's and three stages' open."""
    for resident, most in ((False, 1), (True, 4)):
        with pyrexport.load(bundle, resident=resident) as pipeline:
            seen = []
            pipeline("a", schedule="1-1-1", callback=lambda step, p=pipeline, s=seen: s.append(len(p.graphs._engines)))
            assert max(seen) == most
        assert pipeline.graphs._engines == {}


def test_parts_that_are_absent(make_bundle, cli, refused, tmp_path):
    folder = make_bundle("--no-vae", "--no-text-encoder", "--blocks", "1")
    assert "no text encoder" in refused("sample", folder, "--prompt", "a", "-o", tmp_path / "a.npy", "--quiet")
    with pyrexport.load(folder) as pipeline:
        embeds = np.zeros((64, 32), np.float32)
        assert pipeline(prompt_embeds=embeds, output_type="latent").latents.shape == (16, 5, 8, 8)
    document = json.loads((folder / "manifest.json").read_text())
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "manifest.json").write_text(json.dumps(signed(document | {"decoders": {}})))
    assert json.loads(cli("inspect", bare, "--json", "--quiet").stdout)["decoders"] == {}
    with pyrexport.load(folder) as pipeline, pytest.raises(PyrexportError, match="no VAE"):
        pipeline(prompt_embeds=embeds)


def test_a_provider_that_is_not_there(bundle, tiny, refused, tmp_path):
    arguments = ("--prompt", "a", "-o", tmp_path / "x.npy", "--provider", "CUDAExecutionProvider", "--quiet")
    assert "has no 'CUDAExecutionProvider' here: expected one of" in refused("sample", bundle, *arguments)
    assert "leave out --provider (for bundles)" in refused("sample", tiny, *arguments)
    assert not list(tmp_path.iterdir())


EMBEDS = np.zeros((64, 32), np.float32)
WRONG = [
    {},
    {"prompt": "a", "prompt_embeds": EMBEDS},
    {"prompt": "a", "output_type": "pil"},
    {"prompt": "a", "seed": -1},
    {"prompt_embeds": np.zeros((3, 3), np.float32)},
    {"prompt": "a", "schedule": "x"},
    {"prompt": ["a", "b"]},
    {"prompt": "a", "seed": 1.5},
    {"prompt": "a", "latents": np.zeros((16, 2, 2, 2), complex)},
    {"prompt": "a", "latents": [0.0]},
    {"prompt": "a", "guidance_scale": 3.0, "negative_prompt": "b", "negative_prompt_embeds": EMBEDS},
]


def test_wrong_arguments_to_the_api_are_refused(bundle):
    with pyrexport.load(bundle) as pipeline:
        for arguments in WRONG:
            with pytest.raises(PyrexportError):
                pipeline(**arguments)
        given = {
            "latent": np.zeros((1, 16, 2, 2, 2)),
            "timestep_features": np.zeros((1, 256), np.float32),
            "text": np.zeros((1, 64, 32), np.float32),
        }
        with pytest.raises(PyrexportError, match="expected float32"):
            pipeline.run(stage_key(2), given)
        with pytest.raises(PyrexportError, match="no graph"):
            pipeline.run(stage_key(9), {})


@pytest.mark.parametrize("threads", [-1, 1.5, 10**12])
def test_impossible_threads(bundle, refused, tmp_path, threads):
    with pytest.raises(PyrexportError, match="threads is a whole number"):
        pyrexport.load(bundle, threads=threads)
    refused("sample", bundle, "--prompt", "a", "-o", tmp_path / "a.npy", "--threads", threads)


@pytest.mark.parametrize("given", [None, ["a.pyrx"], b"a.pyrx", 3, "a" * 300, "a/" * 3000, "a\0b", ""])
def test_what_is_no_bundle_is_refused_in_one_line(given):
    with pytest.raises(UsageError, match=r"^[^\n]*expected[^\n]*$"):
        pyrexport.load(given)
