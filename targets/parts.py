"""Parts of what a network is cut into: their names, and the option that limits them."""

from ..runtime.errors import UsageError

__all__ = ["check_limit", "part_name"]


def part_name(name: str, index: int) -> str:
    """Name of a part of what a network, or a program, is cut into: the first has the whole one's, the next NAME-2."""
    return f"{name}-{index + 1}" if index else name


def check_limit(option: str, text: str, example: int) -> str:
    """A number of bytes, as an option's value.

    Raises:
        UsageError: it is none.
    """
    if not text.isdecimal() or not text.isascii() or not int(text[:20]) > 0 or len(text) > 18:
        raise UsageError(f"{option}: expected a number of bytes such as {example}, found '{text:.40}'")
    return text
