"""Many videos: which prompts and seeds they are of, and where they are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ..runtime.bundle.opening import is_bundle
from ..runtime.documents import MAX_INTEGER
from ..runtime.errors import UsageError
from .cluster import Cluster, cluster_options
from .common import PATH

__all__ = ["Many", "many_options"]

MOST_SEEDS = 10_000


class SeedsType(click.ParamType):  # type: ignore[type-arg]
    """Seeds as numbers and ranges with both ends: 0-4 or 1,5,8-9."""

    name = "SEEDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        seeds: dict[int, None] = {}
        for part in str(value).split(","):
            first, dash, last = (text.strip() for text in part.partition("-"))
            ends = (first, last) if dash else (first, first)
            if not all(end.isascii() and end.isdecimal() and len(end) < 20 for end in ends):
                self.fail(f"expected seeds such as 0-4 or 1,5,8-9, found '{value}'", param, ctx)
            start, end = map(int, ends)
            if end < start or end > MAX_INTEGER or len(seeds) + end - start >= MOST_SEEDS:
                self.fail(f"expected at most {MOST_SEEDS:,} seeds, ranges upwards, found '{part}'", param, ctx)
            seeds |= dict.fromkeys(range(start, end + 1))
        return tuple(seeds)


@dataclass(frozen=True)
class Many:
    """What is said of many videos."""

    prompts: Path | None = None
    """A file with a prompt a line."""
    seeds: tuple[int, ...] | None = None
    """Of each prompt."""
    cluster: Cluster = field(default_factory=Cluster)
    """Where they are made."""

    def check(self, seed: int | None) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: it is so.
        """
        for flag, value in (("--seeds", self.seeds), ("--ray", self.cluster.address)):
            if value is not None and self.prompts is None:
                raise UsageError(f"{flag} is for --prompts FILE, whose output is a folder")
        if seed is not None and self.seeds is not None:
            raise UsageError("give either --seed or --seeds")
        if seed is not None and seed < 0:
            raise UsageError(f"a seed is a whole number from 0, found {seed}")

    @property
    def given(self) -> bool:
        """Whether there may be many videos: the output is a folder then."""
        return self.prompts is not None

    def seeds_of(self, seed: int | None) -> tuple[int, ...]:
        """The seeds of each prompt."""
        return self.seeds or (seed or 0,)

    def model(self, model: Path) -> Path:
        """The model, as workers find it.

        Raises:
            UsageError: it is not for workers.
        """
        if self.cluster.address is not None and not is_bundle(model):
            raise UsageError(f"{model} is no bundle, and --ray is for bundles, which need no PyTorch: build one")
        return self.cluster.path(model)

    def stay_open(self, model: Path) -> bool:
        """Whether engines stay open from one video to the next."""
        return self.given and is_bundle(model)


def many_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--prompts`, `--seeds`, `--ray` and `--workers`, as one argument `many`."""

    @wraps(command)
    def wrapped(
        *arguments: Any, prompts: Path | None, seeds: tuple[int, ...] | None, cluster: Cluster, **others: Any
    ) -> Any:
        return command(*arguments, many=Many(prompts, seeds, cluster), **others)

    of_each = "Of --prompts: a video for each prompt and seed, such as 0-4."
    seeds = click.option("--seeds", type=SeedsType(), help=of_each)(cluster_options(wrapped))
    return click.option("--prompts", type=PATH, help="A file with a prompt a line; OUTPUT is a folder then.")(seeds)
