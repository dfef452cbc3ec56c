"""Clocks of stages, held against diffusers' schedulers of Helios."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosScheduler
from diffusers.pipelines.helios.pipeline_helios_pyramid import calculate_shift, optimized_scale
from pyrexport.runtime.chain.clock import Clock, DynamicShift
from pyrexport.runtime.chain.guidance import zero_star
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.pyramid import Pyramid, Resolution
from pyrexport.runtime.chain.schedules import explicit_levels
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.description import Model, parse_model
from pyrexport.runtime.model.families.helios import HELIOS, HeliosConfig

CHUNK = Resolution(33, 384, 640)
SCHEDULERS = {
    "distilled": (HeliosDMDScheduler, {"use_dynamic_shifting": True}),
    "mid": (HeliosScheduler, {}),
    "mid, shifted": (HeliosScheduler, {"use_dynamic_shifting": True}),
    "mid, shifted linearly": (HeliosScheduler, {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    "distilled, other ranges": (HeliosDMDScheduler, {"stage_range": [0, 0.5, 0.75, 1]}),
}


def described(folder: Path, scheduler: type, **options: object) -> Model:
    """The model of a folder that has this scheduler."""
    distilled = scheduler is HeliosDMDScheduler
    index = {"scheduler": ["diffusers", scheduler.__name__], "is_distilled": distilled, "is_cfg_zero_star": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler(**options).save_pretrained(folder / "scheduler")
    return parse_model({"format": 1, **HELIOS.described(folder)}, HELIOS, HeliosConfig(), "test")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_times_and_timesteps_are_the_schedulers(tmp_path: Path, name: str, steps: int) -> None:
    kind, options = SCHEDULERS[name]
    theirs, model = kind(**options), described(tmp_path, kind, **options)
    taken = plan(model.pyramid, CHUNK, model.schedule("-".join([str(steps)] * 3)), chunks=2)[-3 * steps :]
    tokens = [540, 540, 2160]  # the pipeline counts those of the stage before
    for index in range(3):
        own = taken[index * steps : (index + 1) * steps]
        theirs.set_timesteps(steps, index, mu=calculate_shift(tokens[index]))
        pairs = [(step.sigmas[0][0], step.sigmas[0][1]) for step in own]
        expected = list(zip(theirs.sigmas[:-1].tolist(), theirs.sigmas[1:].tolist(), strict=True))
        np.testing.assert_allclose(pairs, expected, atol=1e-12)  # through natural levels and back
        assert [step.timestep for step in own] == theirs.timesteps.to(torch.int64).tolist()


def test_levels_are_where_the_facts_say(tmp_path: Path) -> None:
    """To the printed digits, and so are the timesteps of each stage's first and last step."""
    model = described(tmp_path, HeliosScheduler)
    assert [f"{level:.6f}" for level in model.pyramid.clean_levels] == ["0.000000", "0.500374", "0.888741"]
    steps = plan(model.pyramid, CHUNK, model.schedule("20-20-20"))
    assert [step.timestep for step in steps if step.position in (0, 19)] == [999, 743, 743, 385, 385, 1]


def test_the_first_chunk_takes_twice_the_steps_where_it_is_amplified(tmp_path: Path) -> None:
    model = described(tmp_path, HeliosDMDScheduler)
    steps = plan(model.pyramid, CHUNK, model.schedule("2-1-2"), chunks=3)
    assert [sum(step.chunk == chunk for step in steps) for chunk in range(3)] == [10, 5, 5]
    assert [step.index for step in steps] == list(range(20))
    assert sum(step.ends_chunk for step in steps) == 3


def test_first_steps_are_zero_in_every_chunk_where_guidance_says_so(tmp_path: Path) -> None:
    model = described(tmp_path, HeliosScheduler)
    steps = plan(model.pyramid, CHUNK, model.schedule("3-3-3"), chunks=2)
    assert [step.index for step in steps if step.zeroed] == [0, 1, 9, 10]
    unguided = plan(model.pyramid, CHUNK, model.schedule("3-3-3", guidance_scale=1.0))
    assert not any(step.zeroed for step in unguided)


def test_zero_star_scales_as_diffusers() -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.standard_normal((16, 3, 4, 4)).astype(np.float32) for _ in range(2))
    scale = optimized_scale(torch.from_numpy(one).view(1, -1), torch.from_numpy(other).view(1, -1)).item()
    np.testing.assert_allclose(zero_star(one, other, 5.0), scale * other + 5.0 * (one - scale * other), atol=1e-5)


def test_a_model_with_a_clock_is_written_and_read(tmp_path: Path) -> None:
    for kind, options in SCHEDULERS.values():
        model = described(tmp_path, kind, **options)
        again = parse_model(model.to_json(), HELIOS, model.transformer, "test")
        assert again.pyramid == model.pyramid
        assert again.schedules == model.schedules


def test_explicit_levels_begin_where_they_say(tmp_path: Path) -> None:
    pyramid = described(tmp_path, HeliosScheduler).pyramid
    levels = ((0.99, 0.95), (0.8,), (0.4, 0.1))
    assert explicit_levels(pyramid, levels) == levels
    with pytest.raises(UsageError, match="expected at least one level for stage 1"):
        explicit_levels(pyramid, ((0.99,), (), (0.4,)))


def test_each_chunk_has_noise_of_its_own() -> None:
    draws = [generator(7, chunk).standard_normal(4) for chunk in range(3)]
    assert len({tuple(draw) for draw in draws}) == 3
    np.testing.assert_array_equal(draws[0], generator(7).standard_normal(4))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"timesteps": [[385, 1], [743, 386]]}, "of each of 3 stages"),
        ({"timesteps": [[1, 385], [743, 386], [999, 744]]}, "decreasing"),
        ({"timesteps": [[385, 1], [743, 386], [1999, 744]]}, "0 to 1000"),
        ({"timesteps": [[385, 1], [743, 386], [999, 744]], "whole": 1}, "true or false"),
        ({"timesteps": [[385, 1], [743, 386], [999, 744]], "dynamic_shift": {"form": "square"}}, "missing"),
    ],
)
def test_impossible_clocks_are_refused(document: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Clock.from_json(document, 3, "test")


def test_a_clock_is_there_where_its_kind_has_one(tmp_path: Path) -> None:
    pyramid: Pyramid = described(tmp_path, HeliosScheduler).pyramid
    with pytest.raises(UsageError, match="has a clock"):
        replace(pyramid, clock=None)
    with pytest.raises(UsageError, match="first_frame is joint"):
        replace(pyramid, first_frame_apart=True)
    assert DynamicShift("linear")(1.0, 8640) == 1.0
