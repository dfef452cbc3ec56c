"""The demonstration checkpoints: what they weigh, what is seen of them, and that a bundle computes what they do."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyrexport
import pytest
from click.testing import Result
from conftest import DATA
from judge_shapes import scores
from moving_shapes import SCENES, prompts
from pyrexport.runtime.model.checkpoint import read_checkpoint
from score_moving_shapes import opened

SHAPES = DATA / "moving-shapes"


def test_they_are_whole_small_and_what_they_were() -> None:
    """Every file and no other has its hash, they are small, and weights are stored in 16 bits."""
    listed = dict(reversed(line.split()) for line in (DATA / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(DATA).as_posix(): path for path in DATA.rglob("*/*") if path.is_file()}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == listed
    tiny = sum(path.stat().st_size for name, path in files.items() if "/tiny_decoder/" in name)
    assert tiny <= 1_000_000
    assert sum(path.stat().st_size for path in files.values()) <= 34_000_000 + tiny
    for folder in sorted({name.partition("/")[0] for name in files}):
        components = read_checkpoint(DATA / folder).components
        assert set(components) - {"tiny_decoder"} == {"transformer", "text_encoder", "vae"}
        assert {tensor.dtype for tensors in components.values() for tensor in tensors.values()} == {"float16"}


def test_its_stages_are_those_of_17_frames_of_128x128() -> None:
    """Latents are 5x16x16, and the pyramid makes 320, 48 and 8 tokens of them."""
    checkpoint = read_checkpoint(SHAPES)
    stages = checkpoint.model.stages(checkpoint.resolution)
    assert stages[0].latent == (16, 5, 16, 16)
    assert [stage.tokens for stage in stages] == [320, 48, 8]


@pytest.mark.slow
def test_its_bundle_shows_what_prompts_say(shapes_bundle: Path) -> None:
    """Of six prompts one may be wrong, by the judge that has no learned part. It takes 20 s, without PyTorch."""
    chosen = range(0, len(SCENES), 13)
    with pyrexport.load(shapes_bundle, resident=True) as pipeline:
        videos = [pipeline(prompts()[i], seed=i) for i in chosen]
    clips = [video.frames for video in videos if video.frames is not None]
    assert scores(clips, [SCENES[i] for i in chosen])["all"] >= 5 / 6


@pytest.mark.slow
def test_its_bundle_computes_what_it_computes(shapes_bundle: Path, cli: Callable[..., Result]) -> None:
    """It holds closer than float32's tolerances, which leave room for thirty blocks. It takes 30 s."""
    result = cli("parity", shapes_bundle, "--reference", SHAPES, "--prompt", prompts()[13], "--json", "--quiet")
    assert result.exit_code == 0, result.output
    levels = json.loads(result.stdout)["levels"]
    assert max(levels[name]["relative_l2"] for name in ("text", "stages", "vae")) <= 1e-5
    assert levels["chain"]["relative_l2"] <= 1e-4
    assert levels["video"]["psnr"] >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moving-shapes-ppf", "moving-shapes-distilled"])
def test_its_siblings_show_what_prompts_say(name: str) -> None:
    """Of six prompts one may be wrong, in PyTorch, at their own schedules; it takes 20 s."""
    chosen = range(6, len(SCENES), 13)
    with opened(DATA / name) as (_, _, clip_of):
        clips = [clip_of(prompts()[i], None, None, i) for i in chosen]
    assert scores(clips, [SCENES[i] for i in chosen])["all"] >= 5 / 6
