"""Where each weight lies in a file: every source once, aligned for mapping."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...targets.forms import Placement
from .source import Source

__all__ = ["Places", "place_weights"]

PAGE, CACHE_LINE = 4096, 64
SMALL = 64 * 1024
"""Tensors below this are aligned to a cache line: padding them to pages would cost more than it gives."""


@dataclass(frozen=True)
class Places:
    """The places of one file, and how large it is."""

    of: Mapping[Source, Placement]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without padding."""
        return sum(place.nbytes for place in self.of.values())

    @property
    def components(self) -> list[str]:
        """Components that the file holds weights of, in order."""
        return list(dict.fromkeys(source.component for source in self.of))

    def component(self, name: str) -> dict[Source, Placement]:
        """The places of one component's weights."""
        return {source: place for source, place in self.of.items() if source.component == name}

    def lines(self) -> list[str]:
        """Everything that says where and what, to tell one from another."""
        return [f"{source} {place}" for source, place in self.of.items()]


def place_weights(sources: Iterable[Source]) -> Places:
    """Place every source once, in the given order, component by component."""
    places: dict[Source, Placement] = {}
    end = 0
    unique = dict.fromkeys(sources)
    for component in dict.fromkeys(source.component for source in unique):
        for source in unique:
            if source.component == component:
                stored = source.stored
                alignment = PAGE if stored.nbytes >= SMALL else CACHE_LINE
                offset = -(-end // alignment) * alignment
                places[source] = Placement(offset, stored.nbytes, stored.shape, stored.dtype)
                end = offset + stored.nbytes
    return Places(places, end)
