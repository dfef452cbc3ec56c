"""The chips that contexts are compiled for."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.bundle.engines import Table
from ...runtime.errors import UsageError

__all__ = ["CHIPS", "Chip", "chip_table", "find_chips"]


@dataclass(frozen=True)
class Chip:
    """A system on a chip with a Hexagon tensor processor (HTP)."""

    name: str
    """Part number, in lower case, as files are named by it."""
    soc_model: int
    """The provider's number of it."""
    htp_arch: int
    """Version of its processor."""
    sold_as: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm8450", 36, 69, "Snapdragon 8 Gen 1"),
        Chip("sm8550", 43, 73, "Snapdragon 8 Gen 2"),
        Chip("sc8380xp", 60, 73, "Snapdragon X Elite"),
        Chip("sm8650", 57, 75, "Snapdragon 8 Gen 3"),
        Chip("sm8750", 69, 79, "Snapdragon 8 Elite"),
        Chip("sm8850", 87, 81, "Snapdragon 8 Elite Gen 5"),
        Chip("sc8480xp", 88, 81, "Snapdragon X2 Elite"),
    )
}
"""By name. The numbers are those of the provider (QNN 2.51); each was compiled for, and run in its emulation."""


def find_chips(asked: Sequence[str]) -> tuple[Chip, ...]:
    """Chips by part number or by the name that they are sold by; a text may hold several, with commas between.

    Raises:
        UsageError: one is not known, or none is asked for.
    """
    words = [word.strip() for text in asked for word in text.split(",") if word.strip()]
    named = {_plain(name): chip for chip in CHIPS.values() for name in (chip.name, chip.sold_as)}
    known = "; ".join(f"{chip.name} ({chip.sold_as})" for chip in CHIPS.values())
    if not words:
        raise UsageError(f"target 'qnn' needs a chip to compile for: give --soc, one of {known}")
    for word in words:
        if _plain(word) not in named:
            raise UsageError(f"unknown chip '{word:.40}': expected one of {known}")
    return tuple(dict.fromkeys(named[_plain(word)] for word in words))


def chip_table() -> Table:
    """All of them."""
    rows = tuple((chip.name, chip.sold_as, str(chip.soc_model), f"v{chip.htp_arch}") for chip in CHIPS.values())
    return Table("chips", ("name", "sold as", "number", "architecture"), rows)


def _plain(name: str) -> str:
    """A name without case, spaces and the word that all of them begin with."""
    return name.lower().replace("snapdragon", "").replace(" ", "").replace("-", "")
