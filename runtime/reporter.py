"""What a long operation tells of its progress."""

__all__ = ["Reporter"]


class Reporter:
    """Told what is being done; the command line shows it as progress bars."""

    def part(self, name: str, total: int) -> None:
        """A part of `total` units begins."""

    def advance(self, units: int) -> None:
        """Units of the current part are done."""

    def kept(self, name: str) -> None:
        """A part of an interrupted build is kept."""

    def said(self, line: str) -> None:
        """What a target found out about a graph."""
