"""Calibrating a checkpoint: its reference samples prompts by the runtime's own chain, and its layers are watched."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..export.bundle.tiling import choose_tiles
from ..export.families import modules_of
from ..export.reference.reference import Reference
from ..runtime.bundle.tiles import Tiles
from ..runtime.chain.noise import generator, standard_normal
from ..runtime.chain.plan import StepPlan, plan
from ..runtime.chain.sampler import Conditions, sample
from ..runtime.chain.schedules import Schedule
from ..runtime.errors import UsageError
from ..runtime.files import check_output
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.identity import checkpoint_digest, checkpoint_files
from ..runtime.model.safetensors import check_tensors_output
from ..runtime.quantisation import COMPONENTS, SCHEMES
from ..runtime.ranges import Ranges
from ..runtime.recipe import KEY, Calibration, read_calibration
from ..runtime.reporter import Reporter
from ..runtime.trajectories import TEXTS, Trajectories
from .decide import decide, schemes_of
from .observe import Observer, frame_groups, observed, observed_decoder
from .sensitivity import JUDGED, Judge, keep_worst
from .state import read_state, state_file, write_state

__all__ = ["CalibrationRequest", "calibrate"]

PACKAGES = ("pyrexport", "torch", "diffusers", "transformers", "numpy")
"""Packages whose versions decide what a run gives."""

WATCHED: Mapping[str, tuple[str, ...]] = {
    component: tuple(name for name, scheme in SCHEMES.items() if scheme.searched and component in scheme.components)
    for component in ("transformer", "vae")
}
"""By component whose layers can be watched: methods that a recipe can serve."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What is to be run."""

    prompts: Sequence[str]
    """One run each; without a text encoder each is embedded as noise drawn from its position."""
    schedule: Schedule
    """Of the runs: statistics are those of its levels."""
    seed: int = 0
    """Of the first run; each further one has the next."""
    percentile: float = 100.0
    """Of magnitudes: what is beyond is cut."""
    methods: Mapping[str, str] = field(default_factory=lambda: {"transformer": "w8a8"})
    """That the recipe is for: by component, one of `METHODS` that a recipe can serve."""
    target_psnr: float | None = None
    """Keep layers of the transformer until videos reach this PSNR in dB; None: none is kept."""
    statistics: Path | None = None
    """A recipe of the same run, whose statistics are taken."""


def calibrate(
    checkpoint: Checkpoint, output: Path, request: CalibrationRequest, reporter: Reporter | None = None
) -> Calibration:
    """Sample prompts, and write a recipe of what the layers of the blocks were given.

    What was seen is kept beside the output after each prompt: a call that was interrupted goes on there, to the same
    recipe.

    Args:
        checkpoint: what to calibrate.
        output: the recipe's file.
        request: what to run.
        reporter: told of the steps.

    Raises:
        UsageError: the output cannot be written, an interrupted calibration of other settings lies beside it, or the
            input of a layer is always zero.
        CheckFailed: an input is not finite.
    """
    state, reporter = state_file(output), reporter or Reporter()
    check_tensors_output(output, KEY)
    check_output(state)
    _check(checkpoint, request)
    names, bounds = frame_groups(checkpoint.model.stages(checkpoint.resolution))
    run = _trajectories(checkpoint, request, names)
    reference = Reference(checkpoint)
    if request.statistics is None:
        layers = _statistics(reference, state, request, run, bounds, reporter)
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
    bounds: Sequence[tuple[int, ...]],
    reporter: Reporter,
) -> dict[str, Ranges]:
    """Ranges by layer; what was seen is kept after each prompt."""
    checkpoint = reference.checkpoint
    done, observer = read_state(state, run, bounds)
    model = checkpoint.model
    schedule = replace(request.schedule, first_chunk=())  # one number of steps for all chunks
    steps = plan(model.pyramid, checkpoint.resolution, schedule, model.telling_chunks)
    decodes = "vae" in request.methods
    reporter.begin("calibration", (len(steps) + decodes) * len(request.prompts))
    if done:
        reporter.said(f"{done} of {len(request.prompts)} prompts: kept from an interrupted calibration")
        reporter.advance(done * (len(steps) + decodes))
    if done < len(request.prompts):
        *texts, negative = _embeddings(reference, [*request.prompts[done:], run.negative_prompt], done)
        with _watching(reference, observer, request.methods), _noted(state):
            for index, text in enumerate(texts, done):
                latent = _sample(reference, observer, steps, (text, negative), request.seed + index, reporter)
                if decodes:
                    _decode(reference, latent)
                    reporter.advance(1)
                _check_ranges(observer, run)
                write_state(state, run, index + 1, observer)
    return _ranges(observer, run)


@contextmanager
def _watching(reference: Reference, observer: Observer, components: Iterable[str]) -> Iterator[None]:
    watchers = {"transformer": observed, "vae": observed_decoder}
    with ExitStack() as undone:
        for component in components:
            undone.enter_context(watchers[component](reference, observer))
        yield


@contextmanager
def _noted(state: Path) -> Iterator[None]:
    """Errors say what is kept: see `cli.main`."""
    try:
        yield
    except BaseException as error:
        if state.exists():
            error.add_note(f"{state} keeps the prompts that were done: the same command goes on from them")
        raise


def _taken(file: Path, run: Trajectories) -> dict[str, Ranges]:
    """The ranges of another recipe."""
    found = read_calibration(file)
    ours, theirs = run.to_json(), found.run.to_json()
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise UsageError(f"{file} has statistics of another run ({', '.join(differing)} differ): give its own settings")
    return dict(found.layers)


def _search(reference: Reference, recipe: Calibration, request: CalibrationRequest, reporter: Reporter) -> Calibration:
    """The recipe with the fewest layers kept that reach the target."""
    assert request.target_psnr is not None
    checkpoint, prompts = reference.checkpoint, list(request.prompts[:JUDGED])
    *texts, negative = _embeddings(reference, [*prompts, recipe.run.negative_prompt], 0)
    steps = plan(checkpoint.model.pyramid, checkpoint.resolution, request.schedule)
    judge = Judge(reference, steps, {"text": negative}, schemes_of(request.methods["transformer"]), reporter)
    for index, text in enumerate(texts):
        judge.add(text, request.seed + index)
    layers = set(modules_of(checkpoint.model.family).block_matrices(checkpoint, "transformer"))
    own = {layer: choice for layer, choice in recipe.choices.items() if layer in layers}
    damage = judge.damage(own)
    measured = {layer: replace(choice, damage=damage[layer]) for layer, choice in own.items()}
    chosen, trials = keep_worst(judge, measured, request.target_psnr)
    return replace(recipe, choices={**recipe.choices, **chosen}, target_psnr=request.target_psnr, trials=trials)


def _trajectories(checkpoint: Checkpoint, request: CalibrationRequest, groups: tuple[str, ...]) -> Trajectories:
    model = checkpoint.model
    return Trajectories(
        checkpoint=checkpoint_digest(checkpoint_files(checkpoint)),
        components=tuple(component for component in COMPONENTS if component in request.methods),
        kind=model.pyramid.kind.name,
        stages=model.pyramid.depth,
        groups=groups,
        resolution=checkpoint.resolution,
        schedule=request.schedule,
        prompts=len(request.prompts),
        prompts_sha256=hashlib.sha256("\n".join(request.prompts).encode()).hexdigest(),
        text=TEXTS[0 if checkpoint.text_encoder else 1],
        negative_prompt=model.negative_prompt,
        seed=request.seed,
        percentile=request.percentile,
        versions={name: version(name) for name in PACKAGES},
    )


def _embeddings(reference: Reference, prompts: list[str], first: int) -> list[NDArray[np.float32]]:
    """Embeddings [text length, text width] of prompts, the first of which has a position in the whole list."""
    if reference.checkpoint.text_encoder:
        return list(reference.encode(prompts))
    model = reference.checkpoint.model
    shape = (model.text_length, model.transformer.text_dim)
    return [standard_normal(generator(first + index), shape) for index in range(len(prompts))]


@dataclass(frozen=True)
class _Watched:
    """The reference as a denoiser that says which evaluation comes."""

    reference: Reference
    observer: Observer
    negative: Conditions

    def velocity(self, step: StepPlan, latent: NDArray[np.float32], conditions: Conditions) -> NDArray[np.float32]:
        self.observer.at(step, unconditional=conditions["text"] is self.negative["text"])
        return self.reference.velocity(step, latent, conditions)


def _sample(
    reference: Reference,
    observer: Observer,
    steps: Sequence[StepPlan],
    texts: tuple[NDArray[np.float32], NDArray[np.float32]],
    seed: int,
    reporter: Reporter,
) -> NDArray[np.float32]:
    """Run the chain with the embeddings of a prompt and of the negative one."""
    conditions, negative = {"text": texts[0]}, {"text": texts[1]}
    return sample(
        steps,
        reference.checkpoint.model.pyramid.taps,
        _Watched(reference, observer, negative),
        conditions,
        negative=negative,
        seed=seed,
        callback=lambda _: reporter.advance(1),
        history=reference.checkpoint.model.family.history,
    )


def _decode(reference: Reference, latent: NDArray[np.float32]) -> None:
    """Decode as a bundle does: large frames in tiles, which bounds memory, and is what its layers will be given."""
    frame = latent.shape[2], latent.shape[3]
    (tile,) = choose_tiles(reference.checkpoint, [frame])
    for rows, columns, _ in Tiles(frame, tile or frame).places():
        reference.decode_float(latent[:, :, rows, columns], "vae")


def _ranges(observer: Observer, run: Trajectories) -> dict[str, Ranges]:
    found = {layer: statistics.ranges(run.percentile) for layer, statistics in observer.inputs.items()}
    found = {layer: each if len(each.magnitude) > 1 else each.in_stages(run.stages) for layer, each in found.items()}
    return {layer: found[owner] for layer, owner in observer.owners.items()}


def _check_ranges(observer: Observer, run: Trajectories) -> None:
    """Refuse what nothing can be made of before another prompt is run."""
    for layer, ranges in _ranges(observer, run).items():
        ranges.check(layer, run)
