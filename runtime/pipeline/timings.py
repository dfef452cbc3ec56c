"""Where the time of a call went."""

from dataclasses import dataclass, field

__all__ = ["Timings"]


@dataclass
class Timings:
    """Seconds spent, by what they were spent on."""

    load: float = 0.0
    """Spent on opening engines."""
    engine: dict[str, float] = field(default_factory=dict)
    """Spent inside each graph, by its name."""
    denoise: float = 0.0
    """From the first to the last step of the chain, engines and opening included."""
    preview: float = 0.0
    """Spent on decoding previews, engines and opening included: a part of `denoise`."""
    total: float = 0.0
    """Spent on the whole call."""
    chain_engines: float = 0.0
    """Spent inside engines during the chain."""
    chain_load: float = 0.0
    """Spent on opening engines during the chain."""

    @property
    def glue(self) -> float:
        """Time of the chain that is neither inside an engine nor spent on opening one."""
        return max(0.0, self.denoise - self.chain_engines - self.chain_load)
