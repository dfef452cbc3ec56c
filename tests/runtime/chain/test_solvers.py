"""Each solver against its scheduler in diffusers, from the scheduler's own levels."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from pyrexport.runtime.chain import solvers
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import initial_latent, sample
from pyrexport.runtime.chain.schedules import Schedule, explicit_levels, spaced_levels
from pyrexport.runtime.chain.solvers import SolverChoice
from pyrexport.runtime.errors import UsageError
from support.builders import SMALL, pyramid

PLAIN = pyramid("plain", 1)


def unipc(**options: Any) -> tuple[Any, SolverChoice]:
    """Diffusers' scheduler as Wan's folders configure it, and our solver."""
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=options.get("order", 2),
        solver_type=options.get("variant", "bh2"),
        lower_order_final=options.get("lower_order_final", True),
    )
    return theirs, SolverChoice.of("unipc", **options)


CASES = {
    "euler": lambda: (FlowMatchEulerDiscreteScheduler(shift=3.0), SolverChoice.of("euler")),
    "renoise": lambda: (FlowMatchLCMScheduler(shift=3.0), SolverChoice.of("renoise")),
    **{
        f"unipc {order} {variant}": (lambda order=order, variant=variant: unipc(order=order, variant=variant))
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
    },
}


def field(x: Any, timestep: float) -> Any:
    """A velocity that bends with place and time; NumPy arrays and tensors alike."""
    return x * (0.4 + 0.0004 * timestep) - (x * x) * 0.05 + 0.2


def theirs_from(
    scheduler: Any, steps: int, x: np.ndarray, draws: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """The scheduler's own loop, as a pipeline runs it; where it draws noise, it is given ours."""
    latent, taken = torch.from_numpy(x), iter(draws)
    module = "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor"
    monkeypatch.setattr(module, lambda *arguments, **how: torch.from_numpy(next(taken)))
    for timestep in scheduler.timesteps[:steps]:
        latent = scheduler.step(field(latent, float(timestep)), timestep, latent, return_dict=False)[0]
    return latent.numpy()


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_solver_is_its_scheduler(case: str, steps: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-6 in float64; in float32 within what fifty roundings of values near 1 add up to."""
    scheduler, choice = CASES[case]()
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.to(torch.float64)
    levels = [float(sigma) for sigma in scheduler.sigmas[:-1]]
    chosen = Schedule("own", explicit_levels(PLAIN, [[1.0, *levels[1:]]]), solver=choice)
    run = plan(PLAIN, SMALL, chosen)
    noise = generator(0)
    x = initial_latent(run, noise)[:2].astype(dtype)
    draws = [noise.standard_normal(x.shape, dtype=np.float32).astype(dtype) for _ in run]
    again, solver = iter(draws), choice.start()
    monkeypatch.setattr(solvers, "standard_normal", lambda *arguments: next(again))
    ours = x
    # To σ = 0 diffusers multiplies 0 by an infinite B(h) = h: with bh1 its last step is not a number.
    kept = steps - 1 if "bh1" in case else steps
    for step in run[:kept]:
        ours = solver(step, ours, field(ours, step.timestep), noise)
    expected = theirs_from(scheduler, kept, x, draws, monkeypatch)
    assert ours.dtype == dtype
    # diffusers computes FlowMatch steps in float32 whatever it is given.
    exact = dtype == np.float64 and case.startswith("unipc")
    assert np.abs(ours - expected).max() <= (1e-6 if exact else 1e-5)


@pytest.mark.parametrize("steps", [4, 8, 50])
@pytest.mark.parametrize("case", ["euler", "renoise", "unipc 2 bh2"])
def test_levels_and_timesteps_are_the_schedulers(case: str, steps: int) -> None:
    """Of a plain model, whose users expect `set_timesteps(n)`; UniPC's timesteps are whole numbers."""
    scheduler, choice = CASES[case]()
    scheduler.set_timesteps(steps)
    levels = spaced_levels(PLAIN, (steps,), 3.0, choice)
    run = plan(PLAIN, SMALL, Schedule("own", levels, solver=choice))
    # float32 on their side; UniPC stays 1e-6 short of 1.
    assert np.allclose([step.level for step in run], scheduler.sigmas[:-1], atol=1.2e-6)
    assert np.allclose([step.timestep for step in run], scheduler.timesteps, atol=1e-4)


def test_a_history_ends_with_its_stage() -> None:
    """The first step of a stage is one of the first order, whatever was before it."""
    model, choice = pyramid(), SolverChoice.of("unipc", order=3)
    run = plan(model, SMALL, Schedule("2-2-2", spaced_levels(model, (2, 2, 2)), solver=choice))
    solver, noise = choice.start(), generator(0)
    for step in run:
        x = np.ones(step.stage.latent, np.float32)
        if step.position == 0:
            fresh = choice.start()(step, x, 0.5 * x, noise)
            assert np.array_equal(solver(step, x, 0.5 * x, noise), fresh)
        else:
            solver(step, x, 0.5 * x, noise)


def test_a_scaled_start_begins_below_pure_noise() -> None:
    """σ_0·ε at the first level given, which is not moved to 1."""
    levels = explicit_levels(PLAIN, [[0.9877, 0.5]], scaled_start=True)
    assert levels == ((0.9877, 0.5),)
    scaled = plan(PLAIN, SMALL, Schedule("turbo", levels, solver=SolverChoice.of("renoise"), scaled_start=True))
    pure = plan(PLAIN, SMALL, Schedule("pure", explicit_levels(PLAIN, [[0.5]])))
    assert np.allclose(initial_latent(scaled, generator(3)), 0.9877 * initial_latent(pure, generator(3)))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("heun", "unknown solver 'heun': expected one of euler, unipc, renoise"),
        ({"name": "unipc", "order": 4}, "field 'order': expected 1, 2 or 3, found 4"),
        ({"name": "euler", "order": 2}, "unknown field 'order'"),
        ({"order": 2}, "field 'name' is missing"),
        (7, "expected an object"),
    ],
)
def test_a_solver_that_is_none_is_refused(document: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SolverChoice.from_json(document, "pyramid.json")


def test_options_survive_the_json() -> None:
    for choice in (SolverChoice(), SolverChoice.of("unipc"), SolverChoice.of("unipc", order=3, variant="bh1")):
        assert SolverChoice.from_json(choice.to_json(), "x") == choice
    assert SolverChoice.of("unipc", order=2).to_json() == "unipc"


def test_guided_steps_are_evaluated_at_the_solvers_timestep() -> None:
    """The network is told of whole timesteps by UniPC, twice a step where it is guided."""
    levels = spaced_levels(PLAIN, (3,), 5.0, SolverChoice.of("unipc"))
    run = plan(PLAIN, SMALL, Schedule("3", levels, 5.0, SolverChoice.of("unipc")))
    told: list[float] = []

    class Listener:
        def velocity(self, step: Any, latent: np.ndarray, conditions: Any) -> np.ndarray:
            told.append(step.timestep)
            return 0 * latent

    sample(run, PLAIN.taps, Listener(), {}, negative={})
    assert told == [999, 999, 909, 909, 714, 714]
