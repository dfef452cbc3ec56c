"""A recipe as a picture: ranges by layer and stage, and how they go from level to level."""

from pathlib import Path

import numpy as np

from ..runtime.files import written_beside
from ..runtime.recipe import Calibration

__all__ = ["plot_recipe"]


def plot_recipe(recipe: Calibration, path: Path) -> None:
    """Draw a row for each stage: its layers' greatest and percentile |x|, and the greatest in each step."""
    from matplotlib.figure import Figure  # a figure of its own: pyplot's state is the process's

    rows, layers = recipe.stages, list(recipe.layers)
    figure = Figure(figsize=(14, 0.5 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, width_ratios=(2, 1))
    seen_in = np.array([recipe.of(name).steps for name in layers])
    steps = np.log2(np.where(seen_in > 0, seen_in, np.nan))  # blank where no network is evaluated
    ends = np.cumsum(recipe.run.schedule.steps)
    for stage, (ranges, levels) in enumerate(panels):
        greatest = [recipe.of(name).maximum[stage] for name in layers]
        magnitude = [recipe.of(name).magnitude[stage] for name in layers]
        ranges.vlines(range(len(layers)), magnitude, greatest, color="0.7", linewidth=1)
        ranges.plot(greatest, "o", markersize=3, color="C3", label="greatest |x|")
        ranges.plot(magnitude, "o", markersize=3, color="C0", label=f"P{recipe.run.percentile:g} of |x|")
        ranges.set(yscale="log", title=f"stage {stage}", xlim=(-1, len(layers)))
        _name_layers(ranges, layers, last=stage + 1 == rows)
        seen = recipe.run.schedule.levels[-1 - stage]
        end = int(ends[-1 - stage])
        image = levels.imshow(steps[:, end - len(seen) : end], aspect="auto", interpolation="nearest", cmap="viridis")
        levels.set_xticks(range(len(seen)), [f"{level:.3g}" for level in seen], rotation=60, fontsize=7)
        levels.set(title=f"log2 of the greatest |x| at each level, stage {stage}", ylabel="layer")
        figure.colorbar(image, ax=levels)
    panels[0][0].legend(loc="upper left", fontsize=8)
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=100, format="png", metadata={"Software": None})


def _name_layers(axes: object, layers: list[str], *, last: bool) -> None:
    """Some of their names, as many as can be read."""
    every = -(-len(layers) // 48)
    names = [name.removeprefix("blocks.") for name in layers[::every]] if last else []
    axes.set_xticks(range(0, len(layers), every), names or [""] * len(layers[::every]), rotation=90, fontsize=6)  # type: ignore[attr-defined]
