"""Names of the files of a bundle."""

from ..parts import part_name

__all__ = ["SUFFIX", "engine_file"]

SUFFIX = ".engine"


def engine_file(program: str, part: int = 0) -> str:
    """What the engine of a program lies in, or that of a part of one that is cut."""
    return f"{part_name(program, part)}{SUFFIX}"
