"""What a long operation tells of its progress."""

__all__ = ["Reporter"]


class Reporter:
    """Told what is being done; the command line shows it as progress bars."""

    def begin(self, name: str, total: int) -> None:
        """Work of `total` units begins."""

    def advance(self, units: int) -> None:
        """Units of the work that began last are done."""

    def kept(self, name: str) -> None:
        """A piece of an interrupted build is kept."""

    def said(self, line: str) -> None:
        """A target found something out about a graph."""

    def warned(self, line: str) -> None:
        """Something is missing or not as usual, and the work goes on."""
