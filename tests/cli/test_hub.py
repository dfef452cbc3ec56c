"""Models of the hub: from its cache when it is offline, fetched when it is not, and only what is needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyrexport.cli.hub import find_model
from support.building import ONE_STAGE
from support.hub import command_line, lay_in_cache, serve

LEAN = ("--no-vae", "--no-text-encoder", "--blocks", "1")


def run(*arguments: object, home: Path, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    own = environment(HF_HOME=str(home), **settings)
    return subprocess.run(command_line(*arguments), cwd=cwd, env=own, capture_output=True, text=True)


def environment(**settings: str) -> dict[str, str]:
    """Offline unless they say otherwise, and without a cache of the user's."""
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", **settings}
    given.pop("HF_HUB_CACHE", None)
    return given


@pytest.mark.slow
def test_build_sample_and_parity_work_offline_from_a_cache_made_by_hand(make_checkpoint, make_bundle, tmp_path):
    """Three processes: half a minute."""
    home = tmp_path / "home"
    lay_in_cache(make_checkpoint(*ONE_STAGE), home, "org/model")
    lay_in_cache(make_bundle(*ONE_STAGE), home, "org/bundle")
    built = run("build", "org/model", "--target", "ort", "-o", "out", "--quiet", home=home, cwd=tmp_path)
    assert (built.returncode, built.stderr) == (0, "")
    assert (tmp_path / "out" / "manifest.json").is_file()
    sampled = run("sample", "org/bundle@main", "--prompt", "a", "-o", "x.npy", "--quiet", home=home, cwd=tmp_path)
    assert (sampled.returncode, sampled.stderr) == (0, "")
    proved = run(
        *(
            "parity",
            "org/bundle",
            "--reference",
            "org/model",
            "--quiet",
            "--json",
            "--schedule",
            "1",
            "--no-decode",
        ),
        home=home,
        cwd=tmp_path,
    )
    assert (proved.returncode, proved.stderr) == (0, "")
    assert json.loads(proved.stdout)["passed"]


def test_what_the_cache_does_not_hold_is_refused_in_one_line(tiny, tmp_path):
    lay_in_cache(tiny, tmp_path, "org/model")
    for name in ("org/other", "org/model@v2"):
        result = run("inspect", name, home=tmp_path, cwd=tmp_path)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2
        assert f"{name.partition('@')[0]} is no path here, the hub is offline (HF_HUB_OFFLINE)" in line


def test_a_folder_that_is_there_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert find_model(Path("org/model")) == Path("org/model")
    assert find_model(Path("model.pyrx")) == Path("model.pyrx")
    assert find_model(tmp_path / "missing" / "model") == tmp_path / "missing" / "model"


def test_without_the_client_its_extra_is_named(monkeypatch, refused, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert "pip install 'pyrexport[hub]'" in refused("inspect", "org/model")


def test_only_the_files_that_are_needed_are_fetched_with_progress_and_again_from_the_cache(
    make_checkpoint, bundle, tmp_path
):
    """One process each, no PyTorch."""
    folder = tmp_path / "repository"
    shutil.copytree(make_checkpoint("--shard-bytes", "300000"), folder)
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (folder / "vae" / name).write_bytes(b"x")
    (folder / "assets").mkdir()
    (folder / "assets" / "clip.mp4").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    shown = run("inspect", folder, "--json", home=tmp_path, cwd=tmp_path)
    with serve(folder, "org/model") as (address, asked):
        online = {"home": tmp_path / "home", "cwd": tmp_path, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        result = run("inspect", "org/model", "--json", **online)
    assert result.returncode == 0, result.stderr
    assert "Fetching" in result.stderr
    mine, theirs = json.loads(result.stdout), json.loads(shown.stdout)
    assert mine | {"model": ""} == theirs | {"model": ""}
    unwanted = (
        "README.md",
        "assets/clip.mp4",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    )
    every = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set(asked) == every - set(unwanted)
    again = run("inspect", "org/model", "--json", **online)  # nobody answers by now
    assert json.loads(again.stdout) == mine
    assert "Warning: the hub cannot be reached" in again.stderr
    offline = run("inspect", "org/model", "--json", home=tmp_path / "home", cwd=tmp_path)
    assert (json.loads(offline.stdout), offline.stderr) == (mine, "")


def test_a_bundle_is_fetched_by_its_manifest_and_a_repository_that_is_not_there_is_refused(copy, tmp_path):
    (copy / "README.md").write_text("x")
    (copy / "samples.mp4").write_bytes(b"x")
    with serve(copy, "org/bundle") as (address, asked):
        online = {"home": tmp_path / "home", "cwd": tmp_path, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        result = run("inspect", "org/bundle", "--json", "--quiet", **online)
        missing = run("inspect", "org/nothing", "--quiet", **online)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(asked) == {file.name for file in copy.iterdir()} - {"README.md", "samples.mp4"}
    (line,) = missing.stderr.splitlines()
    assert missing.returncode == 2
    assert "org/nothing is no path here, and the hub does not give it" in line


def loaded(name: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`pyrexport.load` of a name; tells the folder that it opened."""
    code = f"import pyrexport; print(pyrexport.Pipeline.from_pretrained({name!r}).bundle.folder)"
    return subprocess.run([sys.executable, "-c", code], env=environment(**settings), capture_output=True, text=True)


def test_a_bundle_of_the_hub_is_loaded_by_its_name_and_a_checkpoint_is_not_fetched(bundle, tiny, tmp_path):
    with serve(bundle, "org/bundle") as (address, asked):
        online = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        first = loaded("org/bundle", **online)
    assert first.returncode == 0, first.stderr
    assert set(asked) == {file.name for file in bundle.iterdir()}
    again = loaded("org/bundle", **online)  # nobody answers by now
    assert again.stdout == first.stdout
    assert "UserWarning: the hub cannot be reached" in again.stderr
    with serve(tiny, "org/model") as (address, asked):
        refused = loaded("org/model", **online | {"HF_ENDPOINT": address})
    assert "UsageError: org/model holds no manifest.json and is no bundle" in refused.stderr
    assert not asked
