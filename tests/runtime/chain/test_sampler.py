"""The chain against an exact model and against diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pyrexport.runtime.chain.flow import training_pair
from pyrexport.runtime.chain.levels import default_clean_levels, gain
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.pyramid import Pyramid, Resolution
from pyrexport.runtime.chain.resample import downsample, upsample
from pyrexport.runtime.chain.sampler import Step, sample
from pyrexport.runtime.chain.schedules import Schedule, spaced_levels
from pyrexport.runtime.chain.wavelets import WAVELETS
from pyrexport.runtime.errors import UsageError
from support.builders import pyramid

TEXT = np.zeros((1, 1), np.float32)


class Oracle:
    """The velocity of a model that knows x0: the input determines ε, and ε the training target."""

    def __init__(self, pyramid: Pyramid, x0: np.ndarray) -> None:
        self.pyramid = pyramid
        self.clean, self.low = [], []
        for _ in pyramid.stages:
            coarse = [downsample(x0[:, g.frames], pyramid.taps, g.axes) for g in pyramid.groups]
            low = [upsample(c, pyramid.taps, g.axes) for c, g in zip(coarse, pyramid.groups, strict=True)]
            self.clean.append(x0)
            self.low.append(np.concatenate(low, 1))
            x0 = np.concatenate(coarse, 1) if len(self.clean) < pyramid.depth else x0

    def velocity(self, stage, latent, timestep, text):
        out = np.empty_like(latent)
        level = timestep / 1000
        for group in self.pyramid.groups:
            x0, low = (part[stage][:, group.frames].astype(np.float64) for part in (self.clean, self.low))
            mean, _ = training_pair(group, self.pyramid.stages[stage], x0, low, 0 * x0, level)
            sigma = group.global_level(stage, level)
            noise = (latent[:, group.frames] - mean) / sigma
            out[:, group.frames] = training_pair(group, self.pyramid.stages[stage], x0, low, noise, level)[1]
        return out


CASES = [
    (stages, wavelet, apart, steps)
    for stages, wavelet, apart in [(1, "haar", True), (2, "haar", True), (3, "haar", True), (3, "db2", True), (3, "haar", False), (2, "coif1", False), (4, "sym4", True)]
    for steps in ([1] * stages, [2] * (stages - 1) + [1], [10] * stages)
]  # fmt: skip


@pytest.mark.parametrize(("stages", "wavelet", "apart", "steps"), CASES)
def test_an_exact_model_ends_at_the_clean_latent(stages, wavelet, apart, steps):
    scale = 2 ** (stages - 1)
    frames = 1 + 4 * scale * 2 if apart else 1 + 4 * (scale * 2 - 1)
    model = pyramid(
        stages=stages,
        taps=WAVELETS[wavelet],
        first_frame_apart=apart,
        resolution=Resolution(frames, 32 * scale, 16 * scale),
        channels=3,
    )
    x0 = np.random.default_rng(0).standard_normal(model.stages[0].latent).astype(np.float32)
    result = sample(model, Oracle(model, x0), TEXT, Schedule("test", spaced_levels(model, steps)), seed=1)
    assert result.dtype == np.float32
    # float32 rounding of about 2^-23 a step on values up to 5.
    assert np.abs(result - x0).max() < 1e-5


def test_ppf_is_one_euler_run_over_all_stages():
    patches = ((1, 2, 2), (2, 4, 4), (4, 8, 8))
    model = pyramid("ppf", resolution=Resolution(17, 32, 32), patch_sizes=patches, channels=2)
    x0 = np.random.default_rng(0).standard_normal(model.stages[0].latent).astype(np.float32)
    oracle = Oracle(model, x0)
    oracle.low = oracle.clean = [x0] * 3  # plain flow matching in every stage
    result = sample(model, oracle, TEXT, Schedule("2-2-1", spaced_levels(model, (2, 2, 1))), seed=1)
    assert np.abs(result - x0).max() < 1e-5


class Curve:
    """A smooth nonlinear velocity that depends on the text."""

    def velocity(self, stage, latent, timestep, text):
        return np.tanh(latent * text.mean()) * np.float32(timestep / 1000) + np.float32(0.1) * latent


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_one_stage_equals_diffusers_flow_euler_over_50_steps(guidance_scale):
    model = pyramid("plain", 1, resolution=Resolution(5, 32, 32))
    schedule = Schedule("50", spaced_levels(model, (50,)), guidance_scale)
    text, negative = np.full((2, 3), 0.7, np.float32), np.full((2, 3), -0.4, np.float32)
    ours = sample(model, Curve(), text, schedule, negative_text=negative, seed=3)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    x = torch.from_numpy(generator(3).standard_normal(model.stages[0].latent, dtype=np.float32))
    for timestep in scheduler.timesteps:
        v = Curve().velocity(0, x.numpy(), float(timestep), text)
        if guidance_scale > 1:
            unconditional = Curve().velocity(0, x.numpy(), float(timestep), negative)
            v = unconditional + guidance_scale * (v - unconditional)
        x = scheduler.step(torch.from_numpy(v), timestep, x).prev_sample
    # diffusers keeps its sigmas in float32; relative to the size of the latent.
    assert np.abs(ours - x.numpy()).max() <= 1e-6 * max(1, np.abs(ours).max())


def test_the_last_stage_alone_is_not_what_makes_a_sample():
    """Each part of the chain matters: renoising, the first frame's own levels, the order of the bands."""
    model = pyramid(resolution=Resolution(17, 64, 64))
    schedule = Schedule("2-2-1", spaced_levels(model, (2, 2, 1)))
    steps: list[Step] = []
    a = sample(model, Curve(), TEXT, schedule, seed=0, callback=steps.append)
    assert [step.stage for step in steps] == [2, 2, 1, 1, 0]
    assert [step.next_level for step in steps][-1] == 0
    assert np.array_equal(steps[-1].latent, a)
    b = sample(model, Curve(), TEXT, schedule, seed=0)
    assert np.array_equal(a, b)
    assert not np.allclose(a, sample(model, Curve(), TEXT, schedule, seed=1))
    joint = pyramid(resolution=Resolution(17, 64, 64), clean_levels=default_clean_levels(3, gain(2)), axes="HW")
    assert joint.stages[2].latent == (16, 5, 2, 2)


def test_given_latents_replace_the_first_draw_only():
    model = pyramid(resolution=Resolution(17, 64, 64))
    schedule = Schedule("1-1-1", spaced_levels(model, (1, 1, 1)))
    first = generator(9).standard_normal(model.stages[2].latent, dtype=np.float32)
    expected = sample(model, Curve(), TEXT, schedule, seed=9)
    assert np.array_equal(sample(model, Curve(), TEXT, schedule, seed=9, latents=first), expected)
    with pytest.raises(UsageError, match=r"shape \[16, 2, 2, 2\]"):
        sample(model, Curve(), TEXT, schedule, latents=first[:, :1])


def test_guidance_without_negative_embeddings_is_refused():
    model = pyramid(resolution=Resolution(17, 64, 64))
    schedule = Schedule("1-1-1", spaced_levels(model, (1, 1, 1)), 5.0)
    with pytest.raises(UsageError, match="negative prompt"):
        sample(model, Curve(), TEXT, schedule)
