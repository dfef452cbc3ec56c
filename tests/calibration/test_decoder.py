"""A decoder in integers: ranges against activations that were kept, what is stored and computed, what is caught."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import DATA, build
from pyrexport.calibration.run import CalibrationRequest, calibrate
from pyrexport.export.families.wan.vae import decoder_layer
from pyrexport.export.proof.ranges import range_errors
from pyrexport.export.reference.reference import Reference
from pyrexport.export.weights.source import sources_of
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import sample
from pyrexport.runtime.proof.tolerances import tolerances_of
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.runtime.ranges import output_of
from pyrexport.runtime.recipe import read_calibration
from pyrexport.targets.ort import TARGET as ORT
from support.building import small_checkpoint
from support.graphs import blueprint, graph_of
from support.parity import change_weight
from support.stopping import Stop

PROMPTS = ("a cat", "a dog")
SPARE = ("--no-text-encoder",)
METHODS = {"transformer": "w8a8", "vae": "w8a8"}
LAYER = "decoder.up_blocks.1.resnets.0.conv2"


@pytest.fixture
def recipe(shared, make_checkpoint) -> Path:
    """A recipe of a tiny transformer and of its decoder. Not to be changed."""

    def write(out: Path) -> None:
        out.mkdir()
        checkpoint = small_checkpoint(make_checkpoint(*SPARE))
        schedule = checkpoint.model.schedule("1-1-1")
        calibrate(checkpoint, out / "recipe.safetensors", CalibrationRequest(PROMPTS, schedule, methods=METHODS))

    return shared(["decoder recipe"], write) / "recipe.safetensors"


@pytest.fixture
def rounded(recipe, shared, make_checkpoint) -> Path:
    """A bundle by that recipe. Not to be changed: copy it."""
    methods = [word for each in METHODS.items() for word in ("--quantize", "=".join(each))]
    given = (*methods, "--recipe", str(recipe), "--resolution", "17x64x64")
    return shared(["rounded decoder"], lambda out: build(make_checkpoint(*SPARE), out, *given))


def convolutions(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and name.startswith(("decoder.mid_block", "decoder.up_blocks"))
    }


def test_ranges_are_those_of_activations_that_were_kept(recipe, make_checkpoint):
    """Exactly: the same decoder decodes the same latents."""
    checkpoint = small_checkpoint(make_checkpoint(*SPARE))
    reference, found, seen = Reference(checkpoint), read_calibration(recipe), {}

    def keep(name: str, values: torch.Tensor) -> None:
        seen.setdefault(name, []).append(values.clone())

    for name, layer in convolutions(reference.decoder()).items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: keep(name, inputs[0]))
        layer.register_forward_hook(lambda _, inputs, output, name=name: keep(output_of(name), output))
    *texts, negative = reference.embed(dict(enumerate([*PROMPTS, ""]))).values()
    steps = plan(checkpoint.model.pyramid, checkpoint.resolution, found.run.schedule)
    for seed, text in enumerate(texts):
        taps, words = checkpoint.model.pyramid.taps, ({"text": text}, {"text": negative})
        reference.decode_float(sample(steps, taps, reference, words[0], negative=words[1], seed=seed))
    assert {name for name in found.layers if name.startswith("decoder.")} == set(seen)
    for name, values in seen.items():
        channels = torch.cat([each.movedim(1, 0).flatten(1) for each in values], dim=1).numpy()
        for stage in range(found.stages):
            assert np.array_equal(found.of(name).lowest[stage, 0], channels.min(axis=1)), name
            assert np.array_equal(found.of(name).highest[stage, 0], channels.max(axis=1)), name
        np.testing.assert_allclose(found.of(name).square[0], np.mean(channels.astype(float) ** 2, axis=1), 1e-5)


def test_an_interrupted_calibration_goes_on_to_the_same_file(recipe, make_checkpoint, tmp_path):
    checkpoint, parts = small_checkpoint(make_checkpoint(*SPARE)), tmp_path / "recipe.safetensors"
    asked = CalibrationRequest(PROMPTS, checkpoint.model.schedule("1-1-1"), methods=METHODS)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, parts, asked, Stop(5))
    calibrate(checkpoint, parts, asked)
    assert parts.read_bytes() == recipe.read_bytes()


def test_convolutions_are_integers_on_disk_and_in_products(rounded, make_checkpoint, cli):
    """All but the decoder's ends; parity within what the scheme promises, which is not that of float32."""
    layers = len(convolutions(Reference(small_checkpoint(make_checkpoint(*SPARE))).decoder()))
    for name in ("vae_first", "vae_next"):
        model = onnx.load(str(rounded / f"{name}.onnx"), load_external_data=False)
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type == "QLinearConv"]
        assert {stored[node.input[3]] for node in products} == {onnx.TensorProto.INT8}
        # Two convolutions over time have nothing to do in the first frame.
        assert len({node.input[3] for node in products}) == layers - 2 * (name == "vae_first")
        # One before the first convolution, which has three taps once there are caches; the last one makes all frames.
        ends = {"vae_first": 3, "vae_next": 1 + 3 + 1}
        assert Counter(node.op_type for node in model.graph.node)["Conv"] == ends[name]
    result = cli("parity", rounded, "--reference", make_checkpoint(*SPARE), "--json", "--quiet")
    assert result.exit_code == 0, result.stderr
    levels = json.loads(result.stdout)["levels"]
    assert 1e-3 < levels["vae"]["relative_l2"] < SCHEMES["w8a8"].tolerances["vae"]
    assert levels["ranges"]["relative_error"] <= 0.5 / 255 * (1 + 1e-3)


def test_ranges_have_a_tolerance_whatever_is_rounded_by_them(rounded):
    """The decoder alone too: `--quantize vae=w8a8`."""
    manifest = open_bundle(rounded).manifest
    for component in ("transformer", "vae"):
        alone = replace(manifest, quantised={component: "w8a8"})
        assert tolerances_of(alone)["ranges"] == SCHEMES["w8a8"].tolerances["ranges"]


@pytest.mark.parametrize(("field", "place", "factor"), [("", "scale", 2.0), (":output", "output_scale", 0.5)])
def test_a_scale_that_is_off_by_two_is_named(rounded, tmp_path, field, place, factor):
    """Past the hash; the one that is too large cuts nothing, and moves no frame out of tolerance."""
    shutil.copytree(rounded, tmp_path / "bundle")
    layer = decoder_layer(open_bundle(rounded).manifest.model.decoders["vae"], LAYER)
    change_weight(tmp_path / "bundle", [f"{layer}.{place}"], lambda v: [v[0] * np.float32(factor)], "vae_next")
    found = range_errors(open_bundle(tmp_path / "bundle"))
    assert found["worst"]["layer"] == LAYER + field
    assert found["relative_error"] > SCHEMES["w8a8"].tolerances["ranges"]


@pytest.mark.parametrize("checkpoint", ["tiny", "moving-shapes"])
def test_layers_are_where_their_weights_are(checkpoint, make_checkpoint):
    """With as many residual blocks in a level as Wan's own decoders have, and with fewer."""
    drawn = blueprint(make_checkpoint() if checkpoint == "tiny" else DATA / checkpoint, ORT)
    config = drawn.checkpoint.model.decoders["vae"]
    assert config.num_res_blocks == {"tiny": 0, "moving-shapes": 2}[checkpoint]
    sources = sources_of(graph_of(drawn, "vae_next").module)
    kernels = {
        path: source.tensor.removesuffix(".weight")
        for path, source in sources.items()
        if source.tensor.startswith(("decoder.mid_block", "decoder.up_blocks")) and source.tensor.endswith(".weight")
    }
    assert len(set(kernels.values())) > 20
    for path, name in kernels.items():
        assert path.startswith(f"{decoder_layer(config, name)}."), (path, name)


def test_what_a_recipe_does_not_say_is_refused(recipe, make_checkpoint, refused, tmp_path):
    folder, words = make_checkpoint(*SPARE), tmp_path / "prompts.txt"
    words.write_text("a cat\n")
    build = ("build", folder, "--target", "ort", "--resolution", "17x64x64", "-o", tmp_path / "out")
    assert "the method w8a8 needs the ranges of activations" in refused(*build, "--quantize", "vae=w8a8")
    assert "the recipe is for --quantize transformer=w8a8, found no --quantize of it" in refused(
        *build, "--quantize", "vae=w8a8", "--recipe", recipe
    )
    command = ("calibrate", folder, "--prompts", words, "-o", tmp_path / "r.safetensors", "--quiet")
    assert "recipes are of transformer w4, w8a8-dynamic, w8a8; vae w8a8" in refused(*command, "--quantize", "vae=w8")
    assert "layers are kept of the transformer" in refused(*command, "--quantize", "vae=w8a8", "--keep", "auto")
    lean = make_checkpoint("--no-text-encoder", "--no-vae")
    assert "has no vae" in refused("calibrate", lean, *command[2:], "--quantize", "vae=w8a8")
    assert not (tmp_path / "r.safetensors").exists()
