"""Figures of videos, against what can be counted by hand, and quality of bundles against their traces."""

import numpy as np
import pyrexport
import pytest
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.pipeline.pipeline import Pipeline
from pyrexport.runtime.proof.metrics import psnr, ssim
from pyrexport.runtime.proof.quality import (
    SUMMARISED,
    QualityLimits,
    check_quality,
    compare_videos,
    limits_of,
    sharpness,
)
from pyrexport.runtime.proof.trace import Trace
from support.parity import tampered

NONE = QualityLimits(0, np.inf)


def moving_square(shift: int = 1, frames: int = 5) -> np.ndarray:
    """A white square of 4x4 pixels that moves to the right over a black 16x24."""
    video = np.zeros((frames, 16, 24, 3), np.uint8)
    for index in range(frames):
        video[index, 6:10, 2 + shift * index : 6 + shift * index] = 255
    return video


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 230, (5, 16, 24, 3), np.uint8)


def blurred(video: np.ndarray) -> np.ndarray:
    """Each pixel the mean of itself and of its right and lower neighbours."""
    x = video.astype(np.float64)
    return ((x + np.roll(x, -1, 1) + np.roll(x, -1, 2) + np.roll(x, (-1, -1), (1, 2))) / 4).round().astype(np.uint8)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_motion_of_a_square_is_the_pixels_that_change(shift):
    """It leaves a column of 4 pixels behind for each pixel that it moves, and covers as many."""
    found = compare_videos([moving_square(shift)], moving_square(1))
    assert found.motion == pytest.approx(2 * 4 * shift * 255 / (16 * 24))
    assert found.motion_reference == pytest.approx(2 * 4 * 255 / (16 * 24))
    assert found.motion_error == pytest.approx(shift - 1)


def test_a_frozen_video_has_lost_all_motion():
    moving = moving_square()
    found = compare_videos([np.repeat(moving[:1], 5, axis=0)], moving)
    assert found.motion == 0
    assert found.motion_error == 1
    assert found.difference_error == 1  # all of the reference's differences are missing
    assert found.frame_psnr[0] == 100  # the first frame is there
    assert max(found.frame_psnr[1:]) < 20


def test_motion_where_there_should_be_none_is_no_number_that_passes():
    still = np.repeat(moving_square()[:1], 5, axis=0)
    found = compare_videos([moving_square()], still)
    assert found.motion_error == np.inf
    assert found.to_json()["motion_error"] == found.to_json()["difference_error"] == 1e30
    assert compare_videos([still], still).motion_error == 0


def test_what_is_constantly_off_moves_as_the_reference_does():
    found = compare_videos([noise() + np.uint8(3)], noise())
    assert found.motion_error == found.difference_error == 0
    assert found.sharpness == pytest.approx(1)
    assert found.psnr == pytest.approx(20 * np.log10(255 / 3))
    assert found.frame_psnr == pytest.approx([found.psnr] * 5)


def test_sharpness_of_a_point_by_hand():
    """Inside the border the Laplacian of v is -4v at the point and v at its four neighbours: (16 + 4) v² over 9."""
    frame = np.zeros((5, 5, 3))
    frame[2, 2] = 7
    assert sharpness(frame) == pytest.approx(20 * 49 / 9)
    assert sharpness(np.full((5, 5, 3), 9.0)) == pytest.approx(0)
    slope = np.arange(5.0)[:, None, None] + np.zeros((5, 5, 3))
    assert sharpness(slope) == pytest.approx(0)  # second differences alone


def test_a_blurred_video_is_less_sharp_and_a_sharpened_one_more():
    assert compare_videos([blurred(noise())], noise()).sharpness < 0.5
    assert compare_videos([noise()], blurred(noise())).sharpness > 2


@pytest.mark.parametrize("pieces", [[5], [1, 4], [1, 2, 2], [1, 1, 1, 1, 1]])
def test_pieces_make_no_difference_and_psnr_and_ssim_are_those_of_the_whole(pieces):
    found, reference = noise(1), noise(2)
    ends = np.cumsum(pieces)
    result = compare_videos((found[end - n : end] for n, end in zip(pieces, ends, strict=True)), reference)
    assert result.psnr == pytest.approx(psnr(found, reference))
    assert result.ssim == pytest.approx(ssim(found, reference))
    a, b = (np.diff(video.astype(float), axis=0) for video in (found, reference))
    assert result.motion == pytest.approx(np.abs(a).mean())
    assert result.difference_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_one_frame_does_not_move():
    found = compare_videos([noise(1)[:1]], noise(2)[:1])
    assert found.motion_error == found.difference_error == found.motion == 0


def test_limits_are_the_widest_of_the_schemes():
    assert limits_of("fp32") == limits_of("fp32", "bf16") == QualityLimits(30.0, 0.05)
    assert limits_of("fp32", "w4").min_psnr == 22


def quality(bundle, *traces, limits=NONE):
    with pyrexport.load(bundle) as opened:
        return check_quality(opened, [Trace(trace) for trace in traces], limits)


def test_an_fp32_bundle_samples_what_was_recorded(make_bundle, record):
    result = quality(make_bundle(), record(), limits=QualityLimits(60.0, 0.001))
    assert result["passed"]
    (run,) = result["runs"]
    assert [step["stage"] for step in run["chain"]] == [2, 2, 1, 1, 0]
    assert run["relative_l2"] == run["chain"][-1]["relative_l2"] < 1e-4
    assert len(run["frame_psnr"]) == 17
    assert result["median"]["psnr"] > 60


def test_rounding_is_seen_in_every_figure_and_medians_are_over_all_runs(make_bundle, record, tmp_path):
    """One recorded run as it is, and one whose recorded frames stand still."""
    frozen = tampered(
        record(), tmp_path / "t", change=lambda t: t.update({"run.0.frames": t["run.0.frames"][[0] * 17].copy()})
    )
    result = quality(make_bundle(precision="bf16"), record(), frozen, record())
    (good, still, again) = result["runs"]
    assert good == again
    assert result["median"] == {name: good[name] for name in SUMMARISED}
    assert all(np.isfinite(good[name]) for name in SUMMARISED)
    assert good["chain"][0]["relative_l2"] > 1e-5
    assert good["psnr"] < 100
    assert good["motion_error"] > 0
    assert still["motion_error"] == 1e30
    assert still["chain"] == good["chain"]


@pytest.mark.parametrize(("limits", "passed"), [((0, np.inf), True), ((99, np.inf), False), ((0, 0), False)])
def test_each_limit_decides_alone(make_bundle, record, limits, passed):
    assert quality(make_bundle(precision="bf16"), record(), limits=QualityLimits(*limits))["passed"] is passed


def test_latents_that_are_not_finite_end_it_in_one_line(make_bundle, record, monkeypatch):
    monkeypatch.setattr(Pipeline, "velocity", lambda self, step, latent, conditions: latent * np.float32(np.nan))
    with pytest.raises(CheckFailed, match="the latents of 'a red circle', seed 0, are not finite"):
        quality(make_bundle(), record())


@pytest.mark.parametrize(
    ("describe", "change", "words"),
    [
        (lambda d: d["runs"][0].update(decoded=False), None, "holds no frames of its run 0"),
        (None, lambda t: t.pop("run.0.frames"), "no tensor 'run.0.frames'"),
        (None, lambda t: t.update({"run.0.frames": t["run.0.frames"][:9].copy()}), r"expected uint8 \[17, 64, 64, 3\]"),
        (None, lambda t: t.update({"run.0.frames": t["run.0.frames"].astype(np.float32)}), "found float32"),
        (None, lambda t: t.pop("run.0.step.3.after"), "no tensor 'run.0.step.3.after'"),
        (lambda d: d.update(runs=[]), None, "holds no run"),
    ],
)
def test_a_trace_that_lacks_something_is_refused(make_bundle, record, tmp_path, describe, change, words):
    with pytest.raises(UsageError, match=words):
        quality(make_bundle(), tampered(record(), tmp_path / "t", describe, change))
