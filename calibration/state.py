"""What an interrupted calibration has seen, in a file beside its output."""

from collections.abc import Sequence
from pathlib import Path

from ..runtime.documents import Fields
from ..runtime.errors import UsageError
from ..runtime.model.signed import read_signed, write_signed
from ..runtime.trajectories import Trajectories
from .observe import Observer
from .statistics import Sizes, Statistics

__all__ = ["read_state", "state_file", "write_state"]

KEY = "calibration"


def state_file(output: Path) -> Path:
    """Where it is kept."""
    return output.with_name(f".{output.name}.partial")


def write_state(path: Path, run: Trajectories, done: int, observer: Observer) -> None:
    """Keep what was seen of the first prompts."""
    arrays = {f"{layer}/{name}": a for layer, seen in observer.inputs.items() for name, a in seen.arrays.items()}
    document = {
        "run": run.to_json(),
        "done": done,
        "owners": list(observer.owners.items()),
        "inputs": list(observer.inputs),
    }
    write_signed(path, KEY, document, arrays)


def read_state(path: Path, run: Trajectories, bounds: Sequence[tuple[int, ...]]) -> tuple[int, Observer]:
    """How many prompts are done, and what was seen of them; none where there is no file.

    Raises:
        UsageError: the file is damaged, or of other settings; says which.
    """
    sizes = Sizes(run.stages, len(run.passes), sum(run.schedule.steps))
    if not path.exists():
        return 0, Observer(sizes, bounds)
    try:
        document, arrays = read_signed(path, KEY, "an interrupted calibration")
    except UsageError as error:
        raise UsageError(f"{error}: remove it to begin again") from None
    expected, found = run.to_json(), document["run"]
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        raise UsageError(
            f"{path} holds an interrupted calibration of other settings ({', '.join(differing)}): "
            "finish it with its own, or remove it"
        )
    inputs: dict[str, Statistics] = {}
    for layer in document["inputs"]:
        inputs[layer] = Statistics({name.rpartition("/")[2]: arrays[name] for name in arrays if _is_of(name, layer)})
    return Fields(document, str(path)).integer("done"), Observer(sizes, bounds, inputs, dict(document["owners"]))


def _is_of(name: str, layer: str) -> bool:
    return name.rpartition("/")[0] == layer
