"""Work on a Ray cluster: Ray starts, places and restarts the workers, and gives a lost one's work to another."""

import logging
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import click

from ..runtime.errors import CheckFailed, PyrexportError, UsageError

__all__ = ["Cluster", "Open", "Spread", "cluster_options", "in_order", "require_same"]

RESTARTS = 8
"""How often a worker is started again in a run: an item that needs too much memory loses each that takes it up."""

ANSWER_SECONDS = 5.0
"""In which a cluster must answer; Ray itself waits for minutes."""

Result = TypeVar("Result")

Open = Callable[[ExitStack], Callable[[Any], Any]]
"""What a worker is told, pickled: opens what does an item, where the worker is; the stack closes what it holds open."""

Spread = Callable[[Open, Sequence[Any]], Iterator[tuple[int, Any]]]
"""Does items on the workers of a cluster; gives an item's number and result as they come: see `_spread`."""


@dataclass(frozen=True)
class Cluster:
    """Where a command's jobs are done, as it was asked for."""

    address: str | None = None
    """Of a Ray cluster; `local`: one that is started here; None: in this process."""
    workers: int | None = None
    """That are at work at the same time; None: as many as fit."""

    def path(self, path: Path) -> Path:
        """A path as workers find it, which start in other folders."""
        return path if self.address is None else path.absolute()

    @contextmanager
    def connected(self, gpus: int = 0) -> Iterator[Spread | None]:
        """What spreads jobs over workers, each on so many GPUs; None where no address is given.

        Without `workers`, there is one for each machine of the cluster, or for each GPU where these are needed. What is
        printed meanwhile goes to stderr.

        Raises:
            UsageError: Ray is not installed, or no cluster answers there.
        """
        if self.address is None:
            yield None
            return
        with _connected(self.address) as ray:
            yield partial(_spread, ray, self.workers, gpus)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--ray` and `--workers`, as one argument `cluster`."""

    @wraps(command)
    def wrapped(*arguments: Any, ray: str | None, workers: int | None, **others: Any) -> Any:
        if workers is not None and ray is None:
            raise UsageError("--workers is for --ray ADDRESS: on one machine, one thing is done after another")
        return command(*arguments, cluster=Cluster(ray, workers), **others)

    most = click.IntRange(1, 10_000)
    workers = click.option("--workers", type=most, help="Of --ray; default: one for each machine or GPU.")
    return click.option("--ray", metavar="ADDRESS|local", help="Share the work out on a Ray cluster.")(workers(wrapped))


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results in the order of their numbers, each as soon as those before it are there."""
    early: dict[int, Result] = {}
    place = 0
    for number, result in results:
        early[number] = result
        while place in early:
            yield early.pop(place)
            place += 1


def require_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse, on a worker, files and versions that are not those of the command.

    Args:
        here: facts by their names, as the worker finds them.
        there: the same, as the command found them.

    Raises:
        UsageError: some differ; names them.
    """
    differing = [name for name in there if here.get(name) != there[name]]
    if differing:
        raise UsageError(
            f"{', '.join(differing)} on {socket.gethostname()} differ from those of this run: all machines must see "
            "the same files under the same paths, and have the same versions"
        )


class Worker:
    """A process of the cluster that has its work open."""

    def __init__(self, work: Open) -> None:
        self.work, self.stack = work, ExitStack()

    @cached_property
    def _do(self) -> Callable[[Any], Any]:
        return self.work(self.stack)  # with the first item, whose error reaches the one who asked as it is

    def run(self, index: int, item: Any) -> tuple[int, Any]:
        """Do an item; returns its number too."""
        return index, self._do(item)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at an address (HOST:PORT, ray://HOST:PORT, auto) or to a `local` one of its own."""
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise UsageError("--ray needs Ray: pip install 'pyrexport[cluster]', here and on the cluster") from None
    _require_answer(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        quiet["include_dashboard"] = False
    with redirect_stdout(sys.stderr):  # Ray prints what befalls its nodes, and has no option not to
        try:
            ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:  # of another version, or none at all
            raise UsageError(f"no Ray cluster at '{address}': {_first_line(error)}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _spread(ray: Any, workers: int | None, gpus: int, work: Open, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Do items on workers; see `Cluster.connected`.

    Raises:
        UsageError: the cluster has fewer GPUs than a worker needs.
        CheckFailed: a worker was lost too often, or cannot start.
        PyrexportError: what the work itself raised.
    """
    pool_type = import_module("ray.util").ActorPool
    count = min(workers or _places(ray, gpus), len(items))
    options = {"max_restarts": RESTARTS, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    actor = ray.remote(Worker).options(**options, **({"num_gpus": gpus} if gpus else {}))
    pool = pool_type([actor.remote(work) for _ in range(count)])
    for numbered in enumerate(items):
        pool.submit(lambda worker, given: worker.run.remote(*given), numbered)
    while pool.has_next():
        with _one_line(ray):
            result = pool.get_next_unordered()
        yield result
        while (idle := pool.pop_idle()) is not None:  # nothing is left for it: a lost one may start in its place
            ray.kill(idle)


def _places(ray: Any, gpus: int) -> int:
    if not gpus:
        return max(1, sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)))
    found = int(ray.cluster_resources().get("GPU", 0)) // gpus
    if not found:
        raise UsageError(f"a worker needs {gpus} GPU, and the cluster has none: start its nodes with --num-gpus")
    return found


def _require_answer(address: str) -> None:
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        if address not in ("local", "auto"):
            raise UsageError(f"expected the address of a Ray cluster (HOST:PORT, auto) or local, found '{address}'")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at '{address}': {error}; 'ray start --head' prints its address") from None


@contextmanager
def _one_line(ray: Any) -> Iterator[None]:
    """An error of the work as it was raised there, one of the cluster as ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PyrexportError | OSError):
            raise cause from None
        raise CheckFailed(f"a worker failed: {type(cause).__name__}: {_first_line(cause)}") from None
    except ray.exceptions.RayError as error:
        raise CheckFailed(
            f"a worker cannot start, or was lost {RESTARTS + 1} times (has it the memory?): {_first_line(error)}; "
            "run it again"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
