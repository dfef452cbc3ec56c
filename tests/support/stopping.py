"""A calibration that is stopped."""

from pyrexport.runtime.reporter import Reporter


class Stop(Reporter):
    """Interrupts after some steps."""

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
