"""The folder of a checkpoint that is made: whole or not at all."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.files import check_output, sync_folder

__all__ = ["check_apart", "check_new_checkpoint", "new_checkpoint"]


def check_new_checkpoint(out: Path, *, force: bool) -> None:
    """Refuse an output that would not be written, before the work.

    Raises:
        UsageError: something is there that `force` does not replace, or that is no checkpoint.
    """
    check_output(out, folder=True)
    if out.exists() and not force:
        raise UsageError(f"{out} exists: give --force to replace it")
    if out.exists() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise UsageError(f"{out} exists and is not a checkpoint: only a checkpoint is replaced; remove it yourself")


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that holds what it is to be made of: it would be replaced, and links to it lead nowhere.

    Raises:
        UsageError: an input lies in it.
    """
    for path in inputs:
        places = path.absolute(), path.resolve()
        if any(where in (place, *place.parents) for where in (out.absolute(), out.resolve()) for place in places):
            raise UsageError(f"{path} lies in {out}, which would be replaced: choose another output")


@contextmanager
def new_checkpoint(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in, which takes its place when all went well."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=out.absolute().parent) as outer:
        folder = Path(outer) / "checkpoint"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(outer) / "replaced")
        folder.rename(out)
    sync_folder(out.absolute().parent)
