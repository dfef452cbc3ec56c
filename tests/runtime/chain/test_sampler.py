"""The chain against an exact model and against diffusers' scheduler."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow import downsample, training_pair, upsample
from pyrexport.runtime.chain.levels import default_clean_levels, gain
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import StepPlan, plan, single_step
from pyrexport.runtime.chain.pyramid import Geometry, Pyramid, Resolution
from pyrexport.runtime.chain.sampler import Step, sample
from pyrexport.runtime.chain.schedules import Schedule, spaced_levels
from pyrexport.runtime.chain.wavelets import WAVELETS
from pyrexport.runtime.errors import UsageError
from support.builders import SMALL, pyramid

TEXT = {"text": np.zeros((1, 1), np.float32)}


def steps_of(model: Pyramid, size: Resolution, steps, guidance_scale: float = 1.0) -> tuple[StepPlan, ...]:
    """The plan of a schedule that the model's rule spaces."""
    return plan(model, size, Schedule("test", spaced_levels(model, steps), guidance_scale))


class Oracle:
    """The velocity of a model that knows x0: the input determines ε, and ε the training target."""

    def __init__(self, pyramid: Pyramid, size: Resolution, x0: np.ndarray) -> None:
        self.clean, self.low = [], []
        groups = pyramid.groups(size)
        for _ in range(pyramid.depth):
            coarse = [downsample(x0[:, g.frames], pyramid.taps, g.axes) for g in groups]
            low = [upsample(c, pyramid.taps, g.axes) for c, g in zip(coarse, groups, strict=True)]
            self.clean.append(x0)
            self.low.append(np.concatenate(low, 1))
            x0 = np.concatenate(coarse, 1) if len(self.clean) < pyramid.depth else x0

    def velocity(self, step, latent, conditions):
        out, stage = np.empty_like(latent), step.stage
        level = step.timestep / 1000
        for group in stage.groups:
            x0, low = (part[stage.index][:, group.frames].astype(np.float64) for part in (self.clean, self.low))
            mean, _ = training_pair(group, stage, x0, low, 0 * x0, level)
            sigma = group.global_level(stage.index, level)
            noise = (latent[:, group.frames] - mean) / sigma
            out[:, group.frames] = training_pair(group, stage, x0, low, noise, level)[1]
        return out


MODELS = [
    (1, "haar", True),
    (2, "haar", True),
    (3, "haar", True),
    (3, "db2", True),
    (3, "haar", False),
    (2, "coif1", False),
    (4, "sym4", True),
]
CASES = [
    (stages, wavelet, apart, steps)
    for stages, wavelet, apart in MODELS
    for steps in ([1] * stages, [2] * (stages - 1) + [1], [10] * stages)
]


@pytest.mark.parametrize(("stages", "wavelet", "apart", "steps"), CASES)
def test_an_exact_model_ends_at_the_clean_latent(stages, wavelet, apart, steps):
    scale = 2 ** (stages - 1)
    frames = 1 + 4 * scale * 2 if apart else 1 + 4 * (scale * 2 - 1)
    size = Resolution(frames, 32 * scale, 16 * scale)
    geometry = Geometry(channels=3)
    model = pyramid(stages=stages, taps=WAVELETS[wavelet], first_frame_apart=apart, geometry=geometry)
    x0 = np.random.default_rng(0).standard_normal(model.stages(size)[0].latent).astype(np.float32)
    result = sample(steps_of(model, size, steps), model.taps, Oracle(model, size, x0), TEXT, seed=1)
    assert result.dtype == np.float32
    # float32 rounding of about 2^-23 a step on values up to 5.
    assert np.abs(result - x0).max() < 1e-5


def test_ppf_is_one_euler_run_over_all_stages():
    patches, size = ((1, 2, 2), (2, 4, 4), (4, 8, 8)), Resolution(17, 32, 32)
    model = pyramid("ppf", patch_sizes=patches, geometry=Geometry(channels=2))
    x0 = np.random.default_rng(0).standard_normal(model.stages(size)[0].latent).astype(np.float32)
    oracle = Oracle(model, size, x0)
    oracle.low = oracle.clean = [x0] * 3  # plain flow matching in every stage
    result = sample(steps_of(model, size, (2, 2, 1)), model.taps, oracle, TEXT, seed=1)
    assert np.abs(result - x0).max() < 1e-5


def curve(latent, timestep, text):
    """A smooth nonlinear velocity that depends on the text."""
    return np.tanh(latent * text.mean()) * np.float32(timestep / 1000) + np.float32(0.1) * latent


class Curve:
    """A model whose velocity is `curve`."""

    def velocity(self, step, latent, conditions):
        return curve(latent, step.timestep, conditions["text"])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_one_stage_equals_diffusers_flow_euler_over_50_steps(guidance_scale):
    model = pyramid("plain", 1)
    steps = steps_of(model, Resolution(5, 32, 32), (50,), guidance_scale)
    text, negative = np.full((2, 3), 0.7, np.float32), np.full((2, 3), -0.4, np.float32)
    ours = sample(steps, model.taps, Curve(), {"text": text}, negative={"text": negative}, seed=3)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    x = torch.from_numpy(generator(3).standard_normal(steps[0].stage.latent, dtype=np.float32))
    for timestep in scheduler.timesteps:
        v = curve(x.numpy(), float(timestep), text)
        if guidance_scale > 1:
            unconditional = curve(x.numpy(), float(timestep), negative)
            v = unconditional + guidance_scale * (v - unconditional)
        x = scheduler.step(torch.from_numpy(v), timestep, x).prev_sample
    # diffusers keeps its sigmas in float32; relative to the size of the latent.
    assert np.abs(ours - x.numpy()).max() <= 1e-6 * max(1, np.abs(ours).max())


def test_the_last_stage_alone_is_not_what_makes_a_sample():
    """Each part of the chain matters: renoising, the first frame's own levels, the order of the bands."""
    model = pyramid()
    steps = steps_of(model, SMALL, (2, 2, 1))
    taken: list[Step] = []
    a = sample(steps, model.taps, Curve(), TEXT, seed=0, callback=taken.append)
    assert [step.plan.stage.index for step in taken] == [2, 2, 1, 1, 0]
    assert [step.plan.next_level for step in taken][-1] == 0
    assert np.array_equal(taken[-1].latent, a)
    b = sample(steps, model.taps, Curve(), TEXT, seed=0)
    assert np.array_equal(a, b)
    assert not np.allclose(a, sample(steps, model.taps, Curve(), TEXT, seed=1))
    joint = pyramid(clean_levels=default_clean_levels(3, gain(2)), axes="HW")
    assert joint.stages(SMALL)[2].latent == (16, 5, 2, 2)


def test_given_latents_replace_the_first_draw_only():
    model = pyramid()
    steps = steps_of(model, SMALL, (1, 1, 1))
    first = generator(9).standard_normal(steps[0].stage.latent, dtype=np.float32)
    expected = sample(steps, model.taps, Curve(), TEXT, seed=9)
    assert np.array_equal(sample(steps, model.taps, Curve(), TEXT, seed=9, latents=first), expected)
    with pytest.raises(UsageError, match=r"shape \[16, 2, 2, 2\]"):
        sample(steps, model.taps, Curve(), TEXT, latents=first[:, :1])


def test_guidance_without_negative_embeddings_is_refused():
    model = pyramid()
    with pytest.raises(UsageError, match="negative prompt"):
        sample(steps_of(model, SMALL, (1, 1, 1), 5.0), model.taps, Curve(), TEXT)


@pytest.mark.parametrize("kind", ["pyramidal", "ppf"])
def test_a_plan_is_the_schedule_step_by_step(kind):
    """From the noisiest stage on, with each group's own levels, joined end to end within a stage."""
    model = pyramid(kind)
    schedule = Schedule("2-2-1", spaced_levels(model, (2, 2, 1)), 5.0)
    steps = plan(model, SMALL, schedule)
    assert [(step.index, step.stage.index, step.position) for step in steps] == list(
        zip(range(5), (2, 2, 1, 1, 0), (0, 1, 0, 1, 0), strict=True)
    )
    assert tuple(step.level for step in steps) == sum(schedule.levels, ())
    assert [step.timestep for step in steps] == [1000 * step.level for step in steps]
    assert [step.changes_stage for step in steps] == [False, True, False, True, False]
    assert all(step.guided for step in steps)
    for step, (i, group) in product(steps, enumerate(model.groups(SMALL))):
        levels = [group.global_level(step.stage.index, level) for level in (step.level, step.next_level)]
        assert step.sigmas[i] == tuple(levels)
    for step, after in pairwise(steps):
        assert step.next_level == (step.stage.clean if step.changes_stage else after.level)
    assert steps[-1].next_level == 0


def test_a_single_step_is_a_plans_step_without_guidance():
    model = pyramid()
    guided = steps_of(model, SMALL, (2, 2, 1), 5.0)[3]
    single = single_step(model, guided.stage, guided.level)
    assert (single.stage, single.level, single.timestep) == (guided.stage, guided.level, guided.timestep)
    assert [before for before, _ in single.sigmas] == [before for before, _ in guided.sigmas]
    assert not single.guided
