"""Work that is stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from pyrexport.export.lowering import forms
from pyrexport.runtime.reporter import Reporter


def interrupt(*arguments: object) -> None:
    """In place of a function in which the user's interrupt arrives."""
    raise KeyboardInterrupt


def weights_of(cli: Callable[..., Result], out: Path, *words: object) -> bytes:
    """The weights of a bundle for ONNX Runtime, whose build is stopped before its graphs: these take longest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forms, "export_onnx", interrupt)
        result = cli("build", *words, "--target", "ort", "-o", out, "--quiet")
    assert result.exit_code == 130, result.output
    return (out.with_name(f"{out.name}.partial") / "weights.bin").read_bytes()


class Stop(Reporter):
    """Interrupts a calibration after some steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.lines = steps, []

    def begin(self, name: str, total: int) -> None:
        self.counting = name == "calibration"

    def advance(self, units: int) -> None:
        self.left -= units * self.counting
        if self.left < 0:
            raise KeyboardInterrupt

    def said(self, line: str) -> None:
        self.lines.append(line)
