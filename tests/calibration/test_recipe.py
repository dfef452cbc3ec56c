"""Recipes as files: what is written is read, and what was changed, damaged or made of another model is refused."""

from dataclasses import replace

import numpy as np
import pytest
from pyrexport.runtime.chain.guidance import Guidance
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.chain.schedules import Schedule
from pyrexport.runtime.chain.solvers import SolverChoice
from pyrexport.runtime.choices import Choice
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.ranges import Ranges, integer_range
from pyrexport.runtime.recipe import Calibration, Trial, read_calibration
from pyrexport.runtime.trajectories import Trajectories
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

RUN = Trajectories(
    checkpoint="ab" * 32,
    components=("transformer",),
    kind="pyramidal",
    stages=2,
    groups=("first", "rest"),
    resolution=Resolution(17, 64, 64),
    schedule=Schedule("2-1", ((1.0, 0.8), (0.5,)), 3.0, SolverChoice.of("unipc", order=3)),
    prompts=2,
    prompts_sha256="cd" * 32,
    text="encoder",
    negative_prompt="trübe",
    seed=7,
    percentile=99.9,
    versions={"pyrexport": "0.1.0"},
)


def ranges(width: int, groups: int = 2) -> Ranges:
    draw = np.random.default_rng(width)
    shapes = {"lowest": (2, groups, width), "highest": (2, groups, width), "square": (2, width)}
    shapes |= {"magnitude": 2, "passes": (2, 2), "steps": 3}
    found = {name: draw.uniform(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    return Ranges(**found | {"lowest": -found["lowest"]})


def choice(own: Ranges, **tensors) -> Choice:
    scale, zero = integer_range(own.interval())
    return Choice("w8a8", "", 0.5, {"rounded": 0.02}, (0.1, 0.2), {"scale": scale, "zero": zero, **tensors})


LAYERS = {"b.to_q": ranges(4), "a.to_k": ranges(3, groups=1)}
CHOICES = {
    "b.to_q": choice(LAYERS["b.to_q"], migration=np.float32([1, 2, 0.5, 1])),
    "a.to_k": Choice("", "one of the 1 that damage most"),
}
RECIPE = Calibration(RUN, LAYERS, {"transformer": "w8a8"}, CHOICES, 30.0, (Trial(0, 12.5), Trial(1, 31.0)))


def test_a_run_is_read_with_the_guidance_that_it_had():
    guided = replace(RUN.schedule, guidance=Guidance("zero-star", 2), guidance_scale_2=3.5)
    run = replace(RUN, schedule=guided)
    assert Trajectories.from_json(run.to_json(), "test") == run


def changed(**fields: np.ndarray) -> Calibration:
    """The recipe with other ranges of its first layer."""
    return replace(RECIPE, layers={**LAYERS, "b.to_q": replace(LAYERS["b.to_q"], **fields)})


@pytest.fixture
def path(tmp_path):
    RECIPE.to_file(tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


def test_what_is_written_is_read(path):
    found = read_calibration(path)
    assert found.run == RUN
    assert list(found.layers) == ["b.to_q", "a.to_k"]
    assert (found.hash, found.stages, found.warnings) == (RECIPE.hash, 2, ())
    for name, layer in RECIPE.layers.items():
        for field, values in vars(layer).items():
            assert np.array_equal(getattr(found.of(name), field), values)
        written, read = RECIPE.choices[name], found.choices[name]
        assert replace(read, tensors={}) == replace(written, tensors={})
        assert read.tensors.keys() == written.tensors.keys()
        assert all(np.array_equal(read.tensors[tensor], array) for tensor, array in written.tensors.items())
    assert (found.methods, found.target_psnr, found.trials) == (RECIPE.methods, 30.0, RECIPE.trials)
    found.check_fits(RUN.checkpoint, {"a.to_k": 3, "b.to_q": 4}, 2)


def test_the_file_is_one_of_the_safetensors_library(path):
    assert np.array_equal(load_file(path)["a.to_k/highest"], RECIPE.of("a.to_k").highest)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata)  # in another order: the content's hash is the same
    assert read_calibration(path).hash == RECIPE.hash


def test_the_same_recipe_is_the_same_bytes(path, tmp_path):
    read_calibration(path).to_file(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_an_edited_byte_is_refused_wherever_it_is(path, refused):
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    used = len(data[:header].rstrip(b" "))  # what pads the header says nothing
    for place in [*range(0, used, 7), *range(header, len(data), 5), len(data) - 1]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UsageError, match=r"r\.safetensors") as caught:
            read_calibration(path)
        assert "\n" not in str(caught.value)
    assert "was changed since it was made" in refused("inspect", path)


FAULTS = {
    "nan": ("lowest", lambda a: a * np.float32(np.nan), "layer 'b.to_q', lowest: not all values are finite"),
    "infinity": ("square", lambda a: a + np.float32(np.inf), "not all values are finite"),
    "zero": ("magnitude", lambda a: 0 * a, "layer 'b.to_q', stage 0: a range is zero"),
    "negative": ("magnitude", lambda a: -a, "expected nothing below 0"),
    "crossed": ("lowest", lambda a: -9 * a, "a least value is above the greatest"),
    "shape": ("magnitude", lambda a: a[:1], "magnitude: expected float32 [2], found float32 [1]"),
    "groups": ("highest", lambda a: np.concatenate([a, a[:, :1]], axis=1), "expected float32 [2, 2, 4]"),
    "flat": ("square", lambda a: a[0], "square: expected float32 [2, 4]"),
    "dtype": ("steps", lambda a: a.astype(np.float64), "found float64 [3]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_run_can_have_given_is_refused_past_the_hash(fault, path, monkeypatch, refused):
    field, change, said = FAULTS[fault]
    recipe = changed(**{field: change(getattr(RECIPE.of("b.to_q"), field))})
    _refused_past_the_hash(recipe, said, path, monkeypatch, refused)


CHOICE_FAULTS = {
    "no scale": ({"scale": None}, "tensor 'b.to_q/scale' is missing"),
    "zero scale": ({"scale": np.float32([0, 1])}, "layer 'b.to_q', scale: expected values above 0"),
    "nan": ({"migration": np.float32([1, np.nan, 1, 1])}, "layer 'b.to_q', migration: not all values are finite"),
    "negative migration": ({"migration": np.float32([1, -1, 1, 1])}, "expected values above 0"),
    "width": ({"migration": np.ones(3, np.float32)}, "migration: expected float32 [4]"),
    "zero point": ({"zero": np.float32([0.5, 1])}, "whole numbers from 0 to 255"),
    "far zero": ({"zero": np.float32([256, 1])}, "whole numbers from 0 to 255"),
}


@pytest.mark.parametrize("fault", CHOICE_FAULTS)
def test_numbers_that_nothing_is_rounded_by_are_refused(fault, path, monkeypatch, refused):
    fields, said = CHOICE_FAULTS[fault]
    own = CHOICES["b.to_q"]
    tensors = {name: array for name, array in {**own.tensors, **fields}.items() if array is not None}
    recipe = replace(RECIPE, choices={**CHOICES, "b.to_q": replace(own, tensors=tensors)})
    _refused_past_the_hash(recipe, said, path, monkeypatch, refused)


def test_a_layer_without_a_choice_is_refused(path, monkeypatch, refused):
    recipe = replace(RECIPE, choices={"b.to_q": CHOICES["b.to_q"]})
    _refused_past_the_hash(recipe, "ranges or a choice of 'a.to_k', and not both", path, monkeypatch, refused)


def _refused_past_the_hash(recipe, said, path, monkeypatch, refused):
    with pytest.raises(UsageError):
        recipe.to_file(path)
    monkeypatch.setattr(Calibration, "check", lambda self: None)
    recipe.to_file(path)
    monkeypatch.undo()
    assert said in refused("inspect", path)


@pytest.mark.parametrize("name", ["b.to_q/lowest", "a.to_k/square", "b.to_q/migration"])
def test_a_missing_tensor_is_named(name, path, monkeypatch):
    kept = Calibration._arrays(RECIPE)
    monkeypatch.setattr(Calibration, "_arrays", lambda self: {key: kept[key] for key in kept if key != name})
    RECIPE.to_file(path)
    with pytest.raises(UsageError, match=f"tensor '{name}' is missing"):
        read_calibration(path)


def test_an_extra_tensor_is_named(path, monkeypatch):
    kept = Calibration._arrays(RECIPE)
    monkeypatch.setattr(Calibration, "_arrays", lambda self: {**kept, "c/lowest": kept["b.to_q/lowest"]})
    RECIPE.to_file(path)
    with pytest.raises(UsageError, match="unexpected tensor 'c/lowest'"):
        read_calibration(path)


def test_other_files_are_no_recipes(tiny, tmp_path, refused):
    weights = tiny / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "is not a recipe of pyrexport calibrate" in refused("inspect", weights)
    (tmp_path / "r.safetensors").write_bytes(b"nothing")
    assert "is not a whole safetensors file" in refused("inspect", tmp_path / "r.safetensors")
    RECIPE.to_file(tmp_path / "r.safetensors")
    assert "--verify" in refused("inspect", tmp_path / "r.safetensors", "--verify")
    with pytest.raises(UsageError, match="does not exist: expected a recipe"):
        read_calibration(tmp_path / "none.safetensors")


def test_a_recipe_of_another_model_says_what_differs():
    with pytest.raises(UsageError, match=r"another checkpoint: expected one of 000000000000…, found abababababab…"):
        RECIPE.check_fits("0" * 64, {}, 2)
    with pytest.raises(UsageError, match=r"expected 3 stage\(s\), found 2"):
        RECIPE.check_fits(RUN.checkpoint, {}, 3)
    with pytest.raises(UsageError, match=r"no layer 'c\.to_q'"):
        RECIPE.check_fits(RUN.checkpoint, {"c.to_q": 4}, 2)
    with pytest.raises(UsageError, match=r"expected 8 input channels of 'b\.to_q', found 4"):
        RECIPE.check_fits(RUN.checkpoint, {"b.to_q": 8}, 2)


def test_a_later_format_is_refused(path, monkeypatch):
    monkeypatch.setattr("pyrexport.runtime.trajectories.FORMAT", 4)
    RECIPE.to_file(path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"expected 3 \(another format"):
        read_calibration(path)


def test_one_prompt_is_warned_of():
    (line,) = replace(RECIPE, run=replace(RUN, prompts=1)).warnings
    assert "one prompt" in line
