"""Bundles by a recipe: what it moves changes nothing, what it keeps is kept, and both sides round alike."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from pyrexport.calibration.decide import schemes_of
from pyrexport.calibration.rounding import RoundedReference
from pyrexport.calibration.search import migration_vector
from pyrexport.export.families import modules_of
from pyrexport.export.reference.reference import Reference
from pyrexport.export.weights.edits import read_tensor
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.choices import Choice
from pyrexport.runtime.pipeline.pipeline import load
from pyrexport.runtime.proof.metrics import distance
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import integer_range
from pyrexport.runtime.recipe import Calibration, read_calibration
from support.building import LEAN, small_checkpoint

LAYERS = 20


def migrated(recipe: Calibration, checkpoint) -> Calibration:
    """The recipe with a strong migration wherever one can be, whether it pays or not."""
    choices = dict(recipe.choices)
    for group in modules_of(checkpoint.model.family).migrations(checkpoint):
        weights = [read_tensor(checkpoint.transformer[f"{layer}.weight"]) for layer in group]
        for layer in group:
            ranges = recipe.of(layer)
            vector = migration_vector(weights, ranges, SCHEMES["w8a8"], 0.9).numpy()
            scale, zero = integer_range(ranges.interval(vector))
            tensors = {"scale": scale, "zero": zero, "migration": vector}
            choices[layer] = replace(choices[layer], strength=0.9, tensors=tensors)
    return replace(recipe, choices=choices)


def all_kept(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Only what inputs are divided by."""
    kept = {}
    for name, choice in choices.items():
        tensors = {key: array for key, array in choice.tensors.items() if key == "migration"}
        kept[name] = replace(choice, scheme="", reason="asked", tensors=tensors)
    return kept


@pytest.fixture
def built(make_checkpoint, cli, tmp_path):
    """Build the tiny transformer by a recipe."""

    def build(recipe: Calibration, name: str) -> Path:
        recipe.to_file(tmp_path / f"{name}.safetensors")
        method = recipe.methods["transformer"]
        command = ("--quantize", method, "--recipe", tmp_path / f"{name}.safetensors", "-o", tmp_path / name)
        build = ("build", make_checkpoint(*LEAN), "--target", "ort", "--resolution", "17x64x64", "--quiet")
        result = cli(*build, *command)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return build


def stage_error(cli, bundle: Path, checkpoint: Path) -> float:
    """Of a bundle that passes its parity."""
    result = cli("parity", bundle, "--reference", checkpoint, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["levels"]["stages"]["relative_l2"]


def test_migration_alone_changes_nothing(make_checkpoint, lean_recipe, built, cli):
    """Folded into norms, modulations and values, and into the weights: a bundle that keeps every layer is float32's."""
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    recipe = migrated(read_calibration(lean_recipe), checkpoint)
    vectors = [choice.migration for choice in recipe.choices.values() if choice.migration is not None]
    assert len(vectors) == 2 * (3 + 1 + 2 + 1)
    assert all(vector.max() / vector.min() > 1.2 for vector in vectors)
    bundle = built(replace(recipe, choices=all_kept(recipe.choices)), "kept")
    assert stage_error(cli, bundle, checkpoint.folder) < SCHEMES["fp32"].tolerances["stages"]


def test_the_rounded_reference_is_the_bundle(make_checkpoint, lean_recipe, built):
    """Float32 sums differ, and a value at a rounding's edge with them: far below what rounding itself costs."""
    checkpoint = small_checkpoint(make_checkpoint(*LEAN))
    recipe = migrated(read_calibration(lean_recipe), checkpoint)
    kept = ("blocks.0.attn1.to_v", "blocks.1.ffn.net.2")
    recipe = replace(recipe, choices=recipe.choices | {name: all_kept(recipe.choices)[name] for name in kept})
    reference, draw = Reference(checkpoint), np.random.default_rng(0)
    rounded, model = RoundedReference(reference), checkpoint.model
    text = {"text": draw.standard_normal((model.text_length, model.transformer.text_dim)).astype(np.float32)}
    with load(built(recipe, "mixed"), resident=True) as pipeline:
        for stage in model.stages(checkpoint.resolution):
            step = single_step(model.pyramid, stage, (stage.noisy + stage.clean) / 2)
            latent = draw.standard_normal(stage.latent).astype(np.float32)
            found, exact = pipeline.velocity(step, latent, text), reference.velocity(step, latent, text)
            with rounded.rounded(recipe.choices, schemes_of("w8a8")):
                expected = rounded.velocity(step, latent, text)
            cost = distance(expected, exact).relative_l2
            assert cost > 1e-3
            assert distance(found, expected).relative_l2 < 0.2 * cost
            assert np.array_equal(reference.velocity(step, latent, text), exact), "left as it was"


def test_layers_that_are_kept_are_products_of_floats(make_checkpoint, lean_recipe, built, cli):
    """In one block of two: blocks are no longer alike, and each kind is exported once."""
    recipe = read_calibration(lean_recipe)
    name = "blocks.1.attn2.to_q"
    bundle = built(replace(recipe, choices=recipe.choices | {name: all_kept(recipe.choices)[name]}), "one")
    model = onnx.load(str(bundle / "stage0.onnx"), load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == LAYERS - 1
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored[f"{name}.weight"] == onnx.TensorProto.FLOAT
    assert f"{name}.values" not in stored
    error = stage_error(cli, bundle, make_checkpoint(*LEAN))
    assert 3e-4 < error < SCHEMES["w8a8"].tolerances["stages"]


@pytest.mark.parametrize("method", ["w4", "w8a8-dynamic"])
def test_methods_without_ranges_take_recipes_too(method, make_checkpoint, lean_recipe, built, cli, tmp_path):
    checkpoint, prompts = make_checkpoint(*LEAN), lean_recipe.parent / "prompts.txt"
    out = tmp_path / "chosen.safetensors"
    common = ("calibrate", checkpoint, "--prompts", prompts, "--resolution", "17x64x64", "--quiet", "-o", out)
    result = cli(*common, "--statistics", lean_recipe, "--quantize", method)
    assert result.exit_code == 0, result.output
    assert f"for --quantize transformer={method}" in result.stdout
    recipe = migrated(read_calibration(out), small_checkpoint(checkpoint))
    own = {name: {**choice.tensors} for name, choice in read_calibration(out).choices.items()}
    choices = {}
    for name, choice in recipe.choices.items():
        moved = {key: array for key, array in choice.tensors.items() if key == "migration"}
        choices[name] = replace(choice, tensors=own[name] | ({} if method == "w4" else moved))
    error = stage_error(cli, built(replace(recipe, choices=choices), "bundle"), checkpoint)
    assert 1e-4 < error < SCHEMES[method].tolerances["stages"]


def test_a_recipe_of_another_method_or_run_is_refused(make_checkpoint, lean_recipe, refused, tmp_path):
    checkpoint, prompts = make_checkpoint(*LEAN), lean_recipe.parent / "prompts.txt"
    build = ("build", checkpoint, "--target", "ort", "--resolution", "17x64x64", "-o", tmp_path / "out")
    assert "is for --quantize transformer=w8a8, found w4" in refused(
        *build, "--quantize", "w4", "--recipe", lean_recipe
    )
    assert "found no --quantize of it" in refused(*build, "--recipe", lean_recipe)
    again = (
        "calibrate",
        checkpoint,
        "--prompts",
        prompts,
        "--resolution",
        "17x64x64",
        "-o",
        tmp_path / "r.safetensors",
    )
    assert "of another run (seed differ)" in refused(*again, "--seed", "9", "--statistics", lean_recipe)
    assert "has no VAE" in refused(*again, "--statistics", lean_recipe, "--keep", "auto")
    assert "of --keep auto: give both" in refused(*again, "--target-psnr", "30")
    assert not list(tmp_path.iterdir())


def test_the_fewest_layers_that_reach_the_target_are_kept(tiny, cli, tmp_path):
    """Each trial's figure is in the recipe."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    common = ("calibrate", tiny, "--prompts", tmp_path / "p.txt", "--resolution", "17x64x64", "--schedule", "1-1-1")
    out, some = tmp_path / "none.safetensors", tmp_path / "some.safetensors"
    assert cli(*common, "--keep", "auto", "--target-psnr", "1", "-o", out, "--quiet").exit_code == 0
    none = read_calibration(out)
    (first,) = none.trials
    assert first.kept == 0
    assert all(len(choice.damage) == 3 and min(choice.damage) > 0 for choice in none.choices.values())
    target = f"{first.psnr + 0.5:.1f}"
    asked = ("--keep", "auto", "--target-psnr", target, "--statistics", out)
    result = cli(*common, *asked, "-o", some, "--quiet")
    assert result.exit_code == 0, result.output
    assert f"to reach {target} dB: 0 kept: {first.psnr:.1f} dB" in result.stdout
    found = read_calibration(some)
    kept = [name for name, choice in found.choices.items() if not choice.scheme]
    reached = {trial.kept: trial.psnr for trial in found.trials}
    assert reached[len(kept)] >= float(target) > reached[len(kept) - 1]
    worst = sorted(found.choices, key=lambda name: -max(found.choices[name].damage))
    assert set(kept) == set(worst[: len(kept)])
    assert found.choices[kept[0]].reason == f"one of the {len(kept)} that damage most"
