"""`quality --plot FILE`: curves along the chain and along the video, through matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.files import check_output, check_outside_bundles, written_beside

__all__ = ["check_plot", "write_plot"]

LEAST = 1e-16
"""What an error of 0 is drawn at: a logarithmic axis has no 0, and float64 tells no smaller one from it."""


def check_plot(path: Path) -> None:
    """Refuse, before the work, a plot that could not be written.

    Raises:
        UsageError: it is another kind of file, matplotlib is not installed, or something is in its way.
    """
    if path.suffix != ".png":
        raise UsageError(f"--plot writes a .png, found '{path.name}'")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'pyrexport[plot]'")
    check_output(path)
    check_outside_bundles(path)


def write_plot(path: Path, document: dict[str, Any]) -> None:
    """Write what `check_quality` says: errors of the latent after each step, and the PSNR of each frame.

    Runs are named by their number: a font need not have what a prompt is written in.
    """
    from matplotlib.figure import Figure  # a figure of its own: pyplot's state is the process's
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 4), layout="constrained")
    error, angle, video = figure.subplots(1, 3)
    for number, run in enumerate(document["runs"], 1):
        steps = range(1, len(run["chain"]) + 1)
        error.plot(steps, [max(step["relative_l2"], LEAST) for step in run["chain"]], marker=".")
        angle.plot(steps, [max(1 - step["cosine"], LEAST) for step in run["chain"]], marker=".")
        video.plot(run["frame_psnr"], marker=".", label=f"run {number}, seed {run['seed']}")
    error.set(title="relative L2 of the latent", xlabel="after step", yscale="log")
    angle.set(title="1 - cosine of the latent", xlabel="after step", yscale="log")
    for axes in (error, angle):
        for place, stage in _boundaries(document["runs"]):
            axes.axvline(place, color="grey", linestyle=":")
            axes.text(place, 1, f" stage {stage}", transform=axes.get_xaxis_transform(), verticalalignment="top")
    video.axhline(document["limits"]["min_psnr"], color="grey", linestyle=":")
    video.set(title="PSNR of each frame; dotted: the limit of the median", xlabel="frame", ylabel="dB")
    if len(document["runs"]) <= 8:  # more would cover the curves
        video.legend(fontsize="small")
    for axes in (error, angle, video):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _boundaries(runs: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Where stages begin, between two steps, and which: those of all schedules that were run."""
    found = set()
    for run in runs:
        stages = [step["stage"] for step in run["chain"]]
        found |= {(index + 0.5, stage) for index, stage in enumerate(stages) if index and stage != stages[index - 1]}
    return sorted(found)
