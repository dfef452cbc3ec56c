"""Previews: the map, what it is fitted to, and what a run shows."""

from pathlib import Path

import av
import numpy as np
import pyrexport
import pytest
from pyrexport.export.bundle.preview import fit_map
from pyrexport.runtime.chain.plan import StepPlan, plan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.chain.schedules import Schedule
from pyrexport.runtime.chain.solvers import SolverChoice
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.preview import LEAST_R2, PreviewMap
from pyrexport.runtime.pipeline.decoder import frames_from
from pyrexport.runtime.pipeline.preview import clean_latent
from support.builders import pyramid


def test_a_linear_encoder_is_found_exactly() -> None:
    """A VAE whose latents are a linear map of colours is inverted, on frames that were left out too."""
    rng = np.random.default_rng(0)
    into = rng.standard_normal((16, 3)).astype(np.float32)

    def encode(frame: np.ndarray) -> np.ndarray:
        assert frame.shape == (3, 64, 64)
        assert np.abs(frame).max() <= 1
        return np.tensordot(into, frame[:, ::8, ::8], 1)

    found = fit_map(encode, 8)
    assert found.r2 > 0.9999
    colours = rng.random((3, 2, 4, 4), dtype=np.float32)
    shown = found.show(np.tensordot(into, colours * 2 - 1, 1))
    assert shown.shape == (2, 4, 4, 3)
    assert np.abs(shown - 255 * colours.transpose(1, 2, 3, 0)).max() <= 0.6  # rounded


def test_an_encoder_of_noise_has_no_map() -> None:
    rng = np.random.default_rng(0)
    found = fit_map(lambda frame: rng.standard_normal((16, 8, 8)).astype(np.float32), 8)
    assert found.r2 < LEAST_R2


def test_the_last_preview_is_the_video_in_small(shapes_bundle: Path) -> None:
    """Of the demonstration: they grow with the stages, and the last one is like the decoded frames."""
    shown: list[np.ndarray] = []
    with pyrexport.load(shapes_bundle) as pipeline:
        stored = pipeline.bundle.manifest.preview
        assert stored is not None
        assert LEAST_R2 <= stored.r2 <= 1
        sample = pipeline("a red circle moving left", seed=0, preview=shown.append)
        first = frames_from(next(pipeline.decode(sample.latents)))[0]
    assert [frames.shape for frames in (shown[0], shown[-1])] == [(2, 4, 4, 3), (5, 16, 16, 3)]
    small = first.reshape(16, 8, 16, 8, 3).mean((1, 3))
    seen = np.corrcoef(small.ravel(), shown[-1][0].astype(float).ravel())[0, 1]
    assert seen > 0.6  # a map that explains seven tenths of the colours


def test_a_bundle_without_a_map_says_so(bundle: Path) -> None:
    """A VAE of random weights keeps no colours in its channels."""
    with pyrexport.load(bundle) as pipeline, pytest.raises(UsageError, match="no map for previews"):
        pipeline("x", preview=print)


@pytest.mark.parametrize("solver", ["euler", "unipc", "renoise"])
def test_a_preview_is_of_the_clean_latent_whatever_the_solver(solver: str) -> None:
    """A model that knows the clean latent shows it from the first step on: x - σ·v, taken before the step."""
    checkpoint = pyramid("plain", 1)
    schedule = Schedule("5", (tuple(np.linspace(1, 0.2, 5)),), 1.0, SolverChoice.of(solver))
    steps = plan(checkpoint, Resolution(17, 64, 64), schedule)
    clean = np.random.default_rng(0).standard_normal(steps[0].stage.latent).astype(np.float32)

    class Exact:
        def velocity(self, step: StepPlan, latent: np.ndarray, conditions: object) -> np.ndarray:
            return np.asarray((latent - clean) / np.float32(step.sigmas[0][0]), np.float32)

    shown: list[np.ndarray] = []
    sample(steps, checkpoint.taps, Exact(), {}, callback=lambda step: shown.append(clean_latent(step)))
    assert len(shown) == 5
    for found in shown:
        np.testing.assert_allclose(found, clean, atol=1e-5)


def test_the_command_line_writes_a_png_and_a_gif(shapes_bundle: Path, cli, tmp_path: Path) -> None:
    """The last of each is the map of the latents that the run ends with."""
    arguments = ["--prompt", "a red circle moving left", "--schedule", "2-2-1", "-o", tmp_path / "x.npy"]
    for suffix in ("png", "gif"):
        (tmp_path / "x.npy").unlink(missing_ok=True)
        cli("sample", shapes_bundle, *arguments, "--preview", tmp_path / f"now.{suffix}")
    with pyrexport.load(shapes_bundle) as pipeline:
        shown = pipeline.bundle.manifest.preview.show(np.load(tmp_path / "x.npy"))
    with av.open(str(tmp_path / "now.png")) as png:
        sheet = next(png.decode(video=0)).to_ndarray(format="rgb24")
    assert sheet.shape == (34, 5 * 34, 3)
    assert np.abs(sheet[1:33:2, 35:67:2].astype(int) - shown[1]).max() <= 1  # of another rounding
    with av.open(str(tmp_path / "now.gif")) as gif:
        assert float(gif.streams.video[0].average_rate) == pytest.approx(5 * 16 / 17, rel=0.05)  # GIF counts in 10 ms
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in gif.decode(video=0)])
    assert frames.shape == (5, 32, 32, 3)
    # GIF keeps 3, 3 and 2 bits of a colour: blue is rounded by up to 43, and dithered.
    assert np.abs(frames[:, ::2, ::2].astype(float) - shown).mean() < 22


def test_a_preview_that_cannot_be_written(shapes_bundle: Path, bundle: Path, cli, refused, tmp_path: Path) -> None:
    output = ["--prompt", "x", "-o", tmp_path / "x.npy"]
    assert "a .png or a .gif, found 'p.jpg'" in refused(
        "sample", shapes_bundle, *output, "--preview", tmp_path / "p.jpg"
    )
    assert "does not exist" in refused("sample", shapes_bundle, *output, "--preview", tmp_path / "no" / "p.png")
    assert "no map for previews" in refused("sample", bundle, *output, "--preview", tmp_path / "p.png")


def test_a_map_survives_the_json() -> None:
    rows = tuple((float(i), 0.5, -0.25) for i in range(17))
    assert PreviewMap.from_json(PreviewMap(rows, 0.7).to_json(), 16, "x") == PreviewMap(rows, 0.7)
    with pytest.raises(UsageError, match="16 rows of red, green and blue"):
        PreviewMap.from_json({"rgb": [[0, 0, 0]]}, 16, "x")
