"""`calibrate` against an oracle that keeps every activation, and what it says, shows and refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyrexport.calibration import observe
from pyrexport.calibration.run import CalibrationRequest, calibrate
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.chain.noise import generator, standard_normal
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.recipe import read_calibration
from safetensors.numpy import load_file, save_file
from support.building import LEAN, small_checkpoint
from support.stopping import Stop

PROMPTS = ("a red circle moving left", "two cats")
CHECKPOINTS = {
    "pyramidal": ((), "2-2-1"),
    "lean": (LEAN, "2-2-1"),
    "ppf": (("--kind", "ppf", *LEAN), "1-1-1"),
    "plain": (("--kind", "plain", *LEAN), "2"),
}


class Oracle:
    """Every input of every linear layer of a run, kept: {layer: [(stage, step, pass, [tokens, in])]}."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.seen, self.now = reference, {}, (0, 0, 0)
        self.text: dict[str, int] = {}
        for module in dict.fromkeys(stage.transformer for stage in reference.stages):
            for name, layer in module.named_modules():
                if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear):
                    layer.register_forward_hook(lambda _, inputs, output, name=name: self.keep(name, inputs[0]))

    def keep(self, name: str, values: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append((*self.now, values[0].numpy().copy()))

    def velocity(self, step, latent, conditions):
        self.now = (step.stage.index, step.index, int(conditions is self.negative))
        return self.reference.velocity(step, latent, conditions)

    def run(self, schedule, seed):
        checkpoint = self.reference.checkpoint
        steps = plan(checkpoint.model.pyramid, checkpoint.resolution, schedule)
        *texts, negative = self.reference.embed(dict(enumerate([*PROMPTS, checkpoint.model.negative_prompt]))).values()
        self.negative = {"text": negative}
        for index, text in enumerate(texts):
            sample(
                steps,
                checkpoint.model.pyramid.taps,
                self,
                {"text": text},
                negative=self.negative,
                seed=seed + index,
            )
        return self.seen


def request(checkpoint, schedule, **fields) -> CalibrationRequest:
    chosen = checkpoint.model.schedule(schedule, guidance_scale=3.0)
    return CalibrationRequest(PROMPTS, chosen, **fields)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_ranges_are_those_of_activations_that_were_kept(name, make_checkpoint, tmp_path):
    """Maxima exactly: the same modules run, and the tiny feed-forward is one piece."""
    arguments, schedule = CHECKPOINTS[name]
    checkpoint = small_checkpoint(make_checkpoint(*arguments))
    asked = request(checkpoint, schedule, seed=5, percentile=99.0)
    recipe = calibrate(checkpoint, tmp_path / "r.safetensors", asked)
    seen = Oracle(Reference(checkpoint)).run(asked.schedule, 5)
    stages = checkpoint.model.stages(checkpoint.resolution)
    assert list(recipe.layers) == list(seen)
    assert len(seen) == 2 * 10
    for layer, calls in seen.items():
        ranges, text = recipe.of(layer), layer.endswith(("attn2.to_k", "attn2.to_v"))
        apart = name in ("pyramidal", "lean") and not text
        assert ranges.channels.shape == (len(stages), 1 + apart, calls[0][3].shape[1])
        for stage in stages:
            own = np.concatenate([values for index, _, _, values in calls if index == stage.index])
            assert ranges.lowest[stage.index].min() == own.min(), layer
            assert ranges.highest[stage.index].max() == own.max(), layer
            np.testing.assert_allclose(ranges.square[stage.index], np.mean(own.astype(float) ** 2, axis=0), 1e-5)
            true = np.percentile(np.abs(own), 99.0, method="inverted_cdf")
            assert true <= ranges.magnitude[stage.index] <= true * (1 + 1 / 64), layer
            first = stage.grid[1] * stage.grid[2]
            for group, rows in enumerate((slice(0, first), slice(first, None)) if apart else (slice(None),)):
                parts = [np.abs(values[rows]).max(axis=0) for index, *_, values in calls if index == stage.index]
                assert np.array_equal(ranges.channels[stage.index, group], np.max(parts, axis=0)), layer
            for passed in (0, 1):
                found = max(np.abs(v).max() for index, _, p, v in calls if (index, p) == (stage.index, passed))
                assert ranges.passes[stage.index, passed] == found, layer
        for step in range(sum(asked.schedule.steps)):
            assert ranges.steps[step] == max(np.abs(v).max() for _, index, _, v in calls if index == step), layer


def test_a_feed_forward_in_pieces_gives_the_same_up_to_sums(make_checkpoint, tmp_path, monkeypatch):
    """Each token's sums are its own; a product of another number of rows may add them in another order."""
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    asked = request(checkpoint, "2-2-1")
    whole = calibrate(checkpoint, tmp_path / "whole.safetensors", asked)
    monkeypatch.setattr(observe, "FEED_FORWARD_BYTES", 4 * 128 * 7)  # 7 tokens: a piece lies across the first frame
    pieces = calibrate(checkpoint, tmp_path / "pieces.safetensors", asked)
    for layer, ranges in whole.layers.items():
        for field, values in vars(ranges).items():
            tolerance = 1 / 64 if field == "magnitude" else 1e-4
            np.testing.assert_allclose(getattr(pieces.of(layer), field), values, tolerance, 1e-6, err_msg=layer)


def test_the_reference_is_left_as_it_was(make_checkpoint):
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    reference = Reference(checkpoint)
    names, bounds = observe.frame_groups(checkpoint.model.stages(checkpoint.resolution))
    with observe.observed(reference, observe.Observer(observe.Sizes(3, 1, 1), bounds)):
        assert "forward" in vars(reference.stages[0].transformer.blocks[0].ffn)
    for module in reference.stages[0].modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert names == ("first", "rest")


@pytest.mark.parametrize("arguments", [(), LEAN], ids=["text", "noise"])
def test_an_interrupted_calibration_goes_on_to_the_same_file(arguments, make_checkpoint, tmp_path):
    checkpoint = small_checkpoint(make_checkpoint(*arguments))
    asked = request(checkpoint, "2-2-1")
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    calibrate(checkpoint, whole, asked)
    with pytest.raises(KeyboardInterrupt) as stopped:
        calibrate(checkpoint, parts, asked, Stop(8))
    assert ["keeps the prompts that were done" in note for note in stopped.value.__notes__] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".parts.safetensors.partial", "whole.safetensors"]
    second = Stop(100)
    calibrate(checkpoint, parts, asked, second)
    assert second.lines == ["1 of 2 prompts: kept from an interrupted calibration"]
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def recipe(shared, tiny, cli) -> Path:
    """A recipe of the tiny checkpoint. Not to be changed: copy it."""

    def make(path: Path) -> None:
        path.mkdir()
        (path / "prompts.txt").write_text("\n".join(PROMPTS))
        result = cli(
            "calibrate", tiny, "--prompts", path / "prompts.txt", "--schedule", "2-2-1", "-o", path / "r.safetensors"
        )
        assert result.exit_code == 0, result.output

    return shared(["recipe"], make) / "r.safetensors"


def test_a_state_of_other_settings_is_refused(tiny, recipe, prompts, refused, cli, tmp_path):
    checkpoint, out = small_checkpoint(tiny), tmp_path / "r.safetensors"
    asked = CalibrationRequest(PROMPTS, checkpoint.model.schedule("2-2-1"))
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, out, asked, Stop(8))
    common = ["calibrate", tiny, "--prompts", prompts, "-o", out, "--quiet"]
    assert "(schedule, schedule_name)" in refused(*common, "--schedule", "1-1-1")
    assert "(seed)" in refused(*common, "--schedule", "2-2-1", "--seed", 1)
    state = tmp_path / ".r.safetensors.partial"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert "remove it to begin again" in refused(*common, "--schedule", "2-2-1")
    assert cli(*common, "--schedule", "2-2-1", "--statistics", recipe).exit_code == 0
    assert out.read_bytes() == recipe.read_bytes()
    assert state.read_bytes() == data, "another run's, that nothing was taken from"
    state.unlink()
    out.unlink()
    assert cli(*common, "--schedule", "2-2-1").exit_code == 0
    assert out.read_bytes() == recipe.read_bytes()


def test_the_command_writes_a_recipe_a_plot_and_json(tiny, recipe, prompts, cli, tmp_path):
    out, plot = tmp_path / "r.safetensors", tmp_path / "r.png"
    command = ["calibrate", tiny, "--prompts", prompts, "--schedule", "2-2-1", "-o", out, "--plot", plot]
    result = cli(*command, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["recipe"], document["plot"], document["warnings"]) == (str(out), str(plot), [])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert out.read_bytes() == recipe.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "r.png", "r.safetensors"]


def test_inspect_shows_a_recipe_without_torch(recipe, cli):
    result = cli("inspect", recipe)
    assert result.exit_code == 0, result.output
    assert "20 layers of a pyramidal checkpoint" in result.stdout
    assert "blocks.0.attn1.to_q +2" in result.stdout, "layers of the same input share a row"
    document = json.loads(cli("inspect", recipe, "--json").stdout)
    found = read_calibration(recipe)
    assert document["hash"] == found.hash
    assert (
        document["layers"]["blocks.0.attn1.to_q"]["stages"][2]["highest"]
        == found.of("blocks.0.attn1.to_q").highest[2].max()
    )
    code = f"""
import sys
from click.testing import CliRunner
from pyrexport.cli import main
assert CliRunner().invoke(main, ["inspect", {str(recipe)!r}]).exit_code == 0
assert not {{"torch", "diffusers", "safetensors", "onnx", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_one_prompt_and_noise_are_warned_of(make_checkpoint, cli, tmp_path):
    (tmp_path / "p.txt").write_text("a cat")
    common = ["--prompts", tmp_path / "p.txt", "--schedule", "1-1-1", "-o", tmp_path / "r.safetensors", "--quiet"]
    result = cli("calibrate", make_checkpoint(*LEAN), *common)
    assert result.exit_code == 0, result.output
    assert "Warning: the recipe is made of one prompt" in result.stderr
    assert "Warning: the checkpoint has no text encoder" in result.stderr
    assert len(json.loads(cli("inspect", tmp_path / "r.safetensors", "--json").stdout)["warnings"]) == 2


def test_the_checkpoint_is_named_as_a_bundle_names_it(recipe, bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert read_calibration(recipe).run.checkpoint == manifest["provenance"]["checkpoint"]["sha256"]


def test_what_cannot_be_written_is_refused_before_the_work(tiny, prompts, refused, tmp_path):
    common = ["calibrate", tiny, "--prompts", prompts, "-o"]
    assert "a recipe is a .safetensors file" in refused(*common, tmp_path / "r.bin")
    assert "does not exist" in refused(*common, tmp_path / "no" / "r.safetensors")
    assert "--plot writes a .png" in refused(*common, tmp_path / "r.safetensors", "--plot", tmp_path / "r.svg")
    assert "is not writable" in refused(*common, "/proc/r.safetensors")
    weights = tmp_path / "weights.safetensors"
    for content in ((tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes(), b"", b"{}"):
        weights.write_bytes(content)
        assert "exists and is no recipe" in refused(*common, weights)
        assert "exists and is no trace" in refused("parity", "--record", weights, "--reference", tiny)
        assert weights.read_bytes() == content
    weights.unlink()
    assert "unknown schedule" in refused(*common, tmp_path / "r.safetensors", "--schedule", "quick")
    assert "percentile" in refused(*common, tmp_path / "r.safetensors", "--percentile", "0")
    assert list(tmp_path.iterdir()) == [prompts]


def test_weights_that_are_not_finite_are_found(make_checkpoint, prompts, cli, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(make_checkpoint(*LEAN), folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.0.proj.bias"][3] = np.nan
    save_file(tensors, file)
    result = cli("calibrate", folder, "--prompts", prompts, "-o", tmp_path / "r.safetensors", "--schedule", "1-1-1")
    assert result.exit_code == 1
    assert "the input of layer 'blocks.0.ffn.net.2' at stage 2 is not finite" in result.stderr


def test_noise_in_place_of_prompts_is_drawn_from_positions(make_checkpoint):
    reference = Reference(small_checkpoint(make_checkpoint(*LEAN)))
    later = reference.embed({1: "b", 2: ""})
    assert np.array_equal(later[1], standard_normal(generator(1), later[1].shape))
    assert np.array_equal(later[2], reference.embed({0: "a", 1: "b", 2: ""})[2])


def test_an_input_that_is_always_zero_is_refused(recipe):
    found = read_calibration(recipe)
    ranges = found.of("blocks.0.attn1.to_q")
    empty = replace(ranges, magnitude=np.zeros_like(ranges.magnitude))
    with pytest.raises(ValueError, match="a range is zero"):
        replace(found, layers={**found.layers, "blocks.0.attn1.to_q": empty}).check()
