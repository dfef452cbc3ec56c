"""Calibrating a checkpoint: its reference samples prompts by the runtime's own chain, and its layers are watched."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..export.families import modules_of
from ..export.reference.reference import Reference
from ..runtime.chain.plan import plan
from ..runtime.errors import UsageError, noted
from ..runtime.files import check_output
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.safetensors import check_tensors_output
from ..runtime.quantisation import SCHEMES
from ..runtime.ranges import Ranges
from ..runtime.recipe import KEY, Calibration, read_calibration
from ..runtime.reporter import Reporter
from ..runtime.trajectories import Trajectories
from .decide import decide, schemes_of
from .request import CalibrationRequest, trajectories
from .sensitivity import JUDGED, Judge, keep_worst
from .state import read_state, state_file, write_state
from .statistics import Seen
from .watching import Elsewhere, Prompt, Watcher

__all__ = ["CalibrationRequest", "calibrate"]

WATCHED: Mapping[str, tuple[str, ...]] = {
    component: tuple(name for name, scheme in SCHEMES.items() if scheme.searched and component in scheme.components)
    for component in ("transformer", "vae")
}
"""By component whose layers can be watched: methods that a recipe can serve."""


def calibrate(
    checkpoint: Checkpoint,
    output: Path,
    request: CalibrationRequest,
    reporter: Reporter | None = None,
    elsewhere: Elsewhere | None = None,
) -> Calibration:
    """Sample prompts, and write a recipe of what the layers of the blocks were given.

    What was seen is kept beside the output after each prompt: a call that was interrupted goes on there, to the same
    recipe.

    Args:
        checkpoint: what to calibrate.
        output: the recipe's file.
        request: what to run.
        reporter: told of the steps.
        elsewhere: runs the prompts in other processes, to the same recipe; None: they are run here.

    Raises:
        UsageError: the output cannot be written, an interrupted calibration of other settings lies beside it, or the
            input of a layer is always zero.
        CheckFailed: an input is not finite.
    """
    state, reporter = state_file(output), reporter or Reporter()
    check_tensors_output(output, KEY)
    check_output(state)
    _check(checkpoint, request)
    run, reference = trajectories(checkpoint, request), Reference(checkpoint)
    if request.statistics is None:
        layers = _statistics(reference, state, request, run, reporter, elsewhere)
    else:
        layers = _taken(request.statistics, run)
    recipe = decide(reference, run, layers, request.methods, reporter)
    if request.target_psnr is not None:
        recipe = _search(reference, recipe, request, reporter)
    recipe.to_file(output)
    if request.statistics is None:
        state.unlink(missing_ok=True)
    return recipe


def _check(checkpoint: Checkpoint, request: CalibrationRequest) -> None:
    for component, method in request.methods.items():
        if method not in WATCHED.get(component, ()):
            known = "; ".join(f"{name} {', '.join(methods)}" for name, methods in WATCHED.items())
            raise UsageError(f"'{component}={method}' takes no recipe: recipes are of {known}")
        if component not in checkpoint.components:
            raise UsageError(f"{checkpoint.folder} has no {component}: a recipe of it says nothing")
    if checkpoint.model.experts > 1 and "transformer" in request.methods:
        raise UsageError(
            f"{checkpoint.folder} has two transformers, of which no recipe is made yet: "
            "take a method without one, such as w8a8-dynamic, or a recipe of the vae"
        )
    if request.target_psnr is not None and "transformer" not in request.methods:
        raise UsageError("layers are kept of the transformer: give a method of it, or no PSNR to reach")
    if request.target_psnr is not None and not checkpoint.vae:
        raise UsageError(f"{checkpoint.folder} has no VAE: a PSNR is of videos, give no target of it")


def _statistics(
    reference: Reference,
    state: Path,
    request: CalibrationRequest,
    run: Trajectories,
    reporter: Reporter,
    elsewhere: Elsewhere | None,
) -> dict[str, Ranges]:
    """Ranges by layer; what was seen is kept after each prompt."""
    done, seen = read_state(state, run)
    watcher, count = Watcher(reference, request, run, reporter), len(request.prompts)
    reporter.begin("calibration", watcher.units * count)
    if done:
        reporter.said(f"{done} of {count} prompts: kept from an interrupted calibration")
        reporter.advance(done * watcher.units)
    if done < count:
        wanted = {index: request.prompts[index] for index in range(done, count)}
        texts = reference.embed(wanted | {count: run.negative_prompt})
        prompts = [Prompt(index, texts[index], texts[count]) for index in wanted]
        kept = f"{state} keeps the prompts that were done: the same command goes on from them"
        with noted(kept, state.exists):
            for index, found in zip(wanted, _watched(watcher, run, prompts, elsewhere), strict=True):
                seen.add(found)
                _check_ranges(seen, run)
                write_state(state, run, index + 1, seen)
    return _ranges(seen, run)


def _watched(
    watcher: Watcher, run: Trajectories, prompts: Sequence[Prompt], elsewhere: Elsewhere | None
) -> Iterator[Seen]:
    """What is seen in the run of each prompt, in their order."""
    if elsewhere is None:
        yield from map(watcher.watch, prompts)
        return
    for seen in elsewhere(run, prompts):
        watcher.reporter.advance(watcher.units)
        yield seen


def _taken(file: Path, run: Trajectories) -> dict[str, Ranges]:
    """The ranges of another recipe."""
    found = read_calibration(file)
    differing = run.differing(found.run.to_json())
    if differing:
        raise UsageError(f"{file} has statistics of another run ({', '.join(differing)} differ): give its own settings")
    return dict(found.layers)


def _search(reference: Reference, recipe: Calibration, request: CalibrationRequest, reporter: Reporter) -> Calibration:
    """The recipe with the fewest layers kept that reach the target."""
    assert request.target_psnr is not None
    checkpoint, prompts = reference.checkpoint, list(request.prompts[:JUDGED])
    *texts, negative = reference.embed(dict(enumerate([*prompts, recipe.run.negative_prompt]))).values()
    model = checkpoint.model
    steps = plan(model.pyramid, checkpoint.resolution, request.schedule, model.telling_chunks)
    judge = Judge(reference, steps, {"text": negative}, schemes_of(request.methods["transformer"]), reporter)
    for index, text in enumerate(texts):
        judge.add(text, request.seed + index)
    layers = set(modules_of(checkpoint.model.family).block_matrices(checkpoint, "transformer"))
    own = {layer: choice for layer, choice in recipe.choices.items() if layer in layers}
    damage = judge.damage(own)
    measured = {layer: replace(choice, damage=damage[layer]) for layer, choice in own.items()}
    chosen, trials = keep_worst(judge, measured, request.target_psnr)
    return replace(recipe, choices={**recipe.choices, **chosen}, target_psnr=request.target_psnr, trials=trials)


def _ranges(seen: Seen, run: Trajectories) -> dict[str, Ranges]:
    found = {layer: statistics.ranges(run.percentile) for layer, statistics in seen.inputs.items()}
    found = {layer: each if len(each.magnitude) > 1 else each.in_stages(run.stages) for layer, each in found.items()}
    return {layer: found[owner] for layer, owner in seen.owners.items()}


def _check_ranges(seen: Seen, run: Trajectories) -> None:
    """Refuse what nothing can be made of before another prompt is run."""
    for layer, ranges in _ranges(seen, run).items():
        ranges.check(layer, run)
