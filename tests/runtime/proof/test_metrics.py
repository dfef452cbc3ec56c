"""Distances."""

import numpy as np
import pytest
from pyrexport.runtime.proof.metrics import distance, psnr, ssim


def test_metrics_against_numpy_and_by_hand():
    x = np.arange(1.0, 7.0).reshape(2, 3)
    found = distance(x * 1.01, x)
    assert found.relative_l2 == pytest.approx(0.01)
    assert found.max_abs == pytest.approx(0.06)
    assert found.cosine == pytest.approx(1)
    assert distance(-x, x).cosine == pytest.approx(-1)
    assert distance(x * np.nan, x).relative_l2 == np.inf
    frames = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    assert psnr(frames, frames) == 100
    assert psnr(np.zeros_like(frames), np.ones_like(frames)) == pytest.approx(20 * np.log10(255))
    assert ssim(frames, frames) == pytest.approx(1)
    assert ssim(255 - frames, frames) < 0
