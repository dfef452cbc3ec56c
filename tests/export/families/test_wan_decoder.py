"""The decoder's graphs on ONNX Runtime: frames that are computed on together, and frames apart."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import Result
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from pyrexport.export.families.wan import convolutions
from pyrexport.runtime.pipeline.pipeline import load
from pyrexport.runtime.proof.metrics import distance
from support.builders import SMALL


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("--no-text-encoder", "--stages", "1", "--blocks", "1", "--kind", "plain")


@pytest.fixture(scope="module")
def latent() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """The frames that diffusers makes."""
    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval()
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        video = vae.decode((torch.from_numpy(latent) * std + mean)[None]).sample[0]
    return video.transpose(0, 1).numpy()


@pytest.mark.parametrize(
    ("most", "alike"), [(convolutions.TOGETHER, True), (2**17, False), (0, False)], ids=["together", "in part", "apart"]
)
def test_frames_together_and_apart_are_those_of_the_checkpoint(
    checkpoint: Path,
    latent: NDArray[np.float32],
    expected: NDArray[np.float32],
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    alike: bool,
) -> None:
    """An operator for all frames of a level where they are small, one for each where they are not: the same video."""
    monkeypatch.setattr(convolutions, "TOGETHER", most)
    result = cli(
        "build", checkpoint, "--target", "ort", "-o", tmp_path / "bundle", "--quiet", "--resolution", str(SMALL)
    )
    assert result.exit_code == 0, result.output
    with load(tmp_path / "bundle", threads=1) as pipeline:
        frames = np.concatenate(list(pipeline.decode(latent)))
    assert distance(frames, expected).relative_l2 < 3e-6
    first, later = (
        Counter(node.op_type for node in ir.load(tmp_path / "bundle" / f"vae_{name}.onnx").graph)
        for name in ("first", "next")
    )
    assert (first["QuickGelu"] == later["QuickGelu"]) == alike  # as many operators for four frames as for one
    assert not later["Sigmoid"]  # fused already: sessions don't look for it
