"""What users hold becomes a bundle that agrees with its reference; `scripts/check_matrix.py` tries every target."""

from pathlib import Path

import pytest
from support.holdings import HOLDINGS, prove


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("executorch", "8-bit floats"),
        ("executorch", "Wan2.2-A14B"),
        ("trt", "a LoRA"),
        ("trt", "Wan2.2-TI2V"),
    ],
)
def test_on_each_target(target: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"executorch": "executorch", "trt": "tensorrt_rtx"}[target])
    levels = prove(HOLDINGS[kind](tmp_path), target, tmp_path / "bundle")
    assert levels["stages"] <= 1e-5
