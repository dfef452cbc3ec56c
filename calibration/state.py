"""What an interrupted calibration has seen, in a file beside its output."""

from pathlib import Path

from ..runtime.documents import Fields
from ..runtime.errors import UsageError
from ..runtime.model.signed import read_signed, write_signed
from ..runtime.trajectories import Trajectories
from .statistics import Seen, Statistics

__all__ = ["read_state", "state_file", "write_state"]

KEY = "calibration"


def state_file(output: Path) -> Path:
    """Where it is kept."""
    return output.with_name(f".{output.name}.partial")


def write_state(path: Path, run: Trajectories, done: int, seen: Seen) -> None:
    """Keep what was seen of the first prompts."""
    arrays = {f"{layer}/{name}": a for layer, found in seen.inputs.items() for name, a in found.arrays.items()}
    document = {
        "run": run.to_json(),
        "done": done,
        "owners": list(seen.owners.items()),
        "inputs": list(seen.inputs),
    }
    write_signed(path, KEY, document, arrays)


def read_state(path: Path, run: Trajectories) -> tuple[int, Seen]:
    """How many prompts are done, and what was seen of them; none where there is no file.

    Raises:
        UsageError: the file is damaged, or of other settings; says which.
    """
    if not path.exists():
        return 0, Seen()
    try:
        document, arrays = read_signed(path, KEY, "an interrupted calibration")
    except UsageError as error:
        raise UsageError(f"{error}: remove it to begin again") from None
    differing = run.differing(document["run"])
    if differing:
        raise UsageError(
            f"{path} holds an interrupted calibration of other settings ({', '.join(differing)}): "
            "finish it with its own, or remove it"
        )
    inputs: dict[str, Statistics] = {}
    for layer in document["inputs"]:
        inputs[layer] = Statistics({name.rpartition("/")[2]: arrays[name] for name in arrays if _is_of(name, layer)})
    return Fields(document, str(path)).integer("done"), Seen(inputs, dict(document["owners"]))


def _is_of(name: str, layer: str) -> bool:
    return name.rpartition("/")[0] == layer
