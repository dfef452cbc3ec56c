"""Kinds of models, as facts: what is true of each stands here, and nowhere else is a kind asked for by its name."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """How the stages of a model differ from each other."""

    name: str
    """The label in `pyramid.json` and for people."""
    halves: bool
    """Axes of the latent are halved from one stage to the next."""
    own_patch_layers: bool
    """Each stage has a patch embedding and an output projection of its own, with its own patch size."""
    resizes: bool
    """A latent that no patch size divides is resized to one that it does, and the velocity back."""
    first_frame_embedding: bool
    """A learned vector is added to every token of the first frame."""
    most_stages: int
    spacing: str
    """The rule that spaces a schedule's levels: a name of `schedules.SPACINGS`."""
    schedule_axes: int | None
    """Axes whose gain spaces schedules; None: those that are halved."""
    clocked: bool = False
    """Stages have clocks of their own: see `clock.Clock`."""

    def timestep(self, level: float) -> float:
        """What the network is conditioned on at a natural level: 1000·ς, not rounded."""
        return 1000 * level


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "pyramidal",
            halves=True,
            own_patch_layers=False,
            resizes=False,
            first_frame_embedding=True,
            most_stages=8,
            spacing="stages",
            schedule_axes=None,
        ),
        Kind(
            "clocked",
            halves=True,
            own_patch_layers=False,
            resizes=False,
            first_frame_embedding=False,
            most_stages=8,
            spacing="clocks",
            schedule_axes=None,
            clocked=True,
        ),
        Kind(
            "ppf",
            halves=False,
            own_patch_layers=True,
            resizes=True,
            first_frame_embedding=False,
            most_stages=8,
            spacing="stages",
            schedule_axes=3,
        ),
        Kind(
            "plain",
            halves=False,
            own_patch_layers=False,
            resizes=False,
            first_frame_embedding=False,
            most_stages=1,
            spacing="sigmas",
            schedule_axes=3,
        ),
    )
}
"""Every kind, by its name."""
