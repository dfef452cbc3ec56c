"""`init SOURCE`: an author's files, in whatever form, become a checkpoint with the same weights."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from pyrexport.export.reference.reference import Reference
from pyrexport.export.weights.edits import read_tensor
from pyrexport.export.weights.lora import merge_loras, parse_lora
from pyrexport.export.weights.names import to_diffusers
from pyrexport.export.weights.pickled import read_any_header
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import Checkpoint, Files, read_checkpoint
from safetensors.torch import load_file, save_file
from support.originals import original_residual_vae, original_text, original_transformer, original_vae
from support.stopping import weights_of
from support.tiny_decoders import write_tiny_decoder

Make = Callable[..., Path]
Run = Callable[..., Result]
Refused = Callable[..., str]
Tensors = dict[str, torch.Tensor]

CONFIG = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "text_len": 64,
    "in_dim": 16,
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 256,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 2,
    "eps": 1e-06,
    "text_dim": 32,
}
"""The tiny transformer's, as Wan's repositories write it."""


def tensors_of(folder: Path, rename: Callable[[str], str] = str) -> Tensors:
    """All tensors of a component's folder, under other names."""
    (file,) = folder.glob("*.safetensors")
    return {rename(name): tensor for name, tensor in load_file(file).items()}


def opened(folder: Path) -> Checkpoint:
    """A checkpoint, names converted."""
    return read_checkpoint(folder, rename=to_diffusers)


def values(found: Checkpoint) -> Tensors:
    """All of a checkpoint's weights."""
    return {
        f"{component}/{name}": read_tensor(entry)
        for component, entries in found.components.items()
        for name, entry in entries.items()
    }


def same(a: Tensors, b: Tensors) -> bool:
    """Whether two have the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny plain checkpoint whose VAE has Wan's own number of blocks: the conversion of names knows no other."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    shutil.copytree(make_checkpoint("--kind", "plain"), folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def original(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as Wan's repositories have it: original names, pickles of VAE and text encoder."""
    folder = tmp_path_factory.mktemp("original")
    transformer = tensors_of(plain / "transformer", original_transformer)
    save_file(transformer, folder / "diffusion_pytorch_model.safetensors")
    torch.save(tensors_of(plain / "vae", original_vae), folder / "Wan2.1_VAE.pth")
    torch.save(tensors_of(plain / "text_encoder", original_text), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(plain / "tokenizer", folder / "google" / "umt5-xxl")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def single(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as single files, the transformer with ComfyUI's prefix and without any configuration."""
    folder = tmp_path_factory.mktemp("single")
    rename: Callable[[str], str] = lambda name: f"model.diffusion_model.{original_transformer(name)}"  # noqa: E731
    save_file(tensors_of(plain / "transformer", rename), folder / "model.safetensors")
    save_file(tensors_of(plain / "vae", original_vae), folder / "vae.safetensors")
    save_file(tensors_of(plain / "text_encoder", original_text), folder / "text.safetensors")
    return folder


def single_words(single: Path, plain: Path) -> list[Any]:
    """The command line for `single`."""
    return [
        *(single / "model.safetensors", "--heads", "4", "--tokenizer", plain / "tokenizer"),
        *("--vae", single / "vae.safetensors", "--text-encoder", single / "text.safetensors"),
    ]


def test_bundles_of_folders_and_files_have_the_same_weights(
    plain: Path, original: Path, single: Path, tmp_path: Path, cli: Run
) -> None:
    """The files' bundle is made whole."""
    found = set()
    for index, words in enumerate(([plain], [original], single_words(single, plain))):
        made = tmp_path / f"made{index}"
        result = cli("init", *words, "-o", made, "--resolution", "17x64x64", "--quiet")
        assert result.exit_code == 0, result.output
        found.add(weights_of(cli, tmp_path / f"out{index}", made))
    result = cli("build", made, "--target", "ort", "-o", tmp_path / "out2", "--quiet", "--no-run")
    assert result.exit_code == 0, result.output
    assert found == {(tmp_path / "out2" / "weights.bin").read_bytes()}


def test_configurations_are_read_off_the_shapes(plain: Path, single: Path, tmp_path: Path, cli: Run) -> None:
    result = cli("init", *single_words(single, plain), "-o", tmp_path / "made", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["components"] == dict.fromkeys(("transformer", "vae", "text_encoder"), "linked")
    assert said["missing"] == said["left_out"] == []
    assert {"scheduler UniPC, shift 5", "prompts of 512 tokens", "resolution 81x480x832"} <= set(said["assumed"])
    ours, theirs = opened(tmp_path / "made"), opened(plain)
    assert ours.model.transformer == theirs.model.transformer
    assert ours.model.decoders == theirs.model.decoders
    for name in ("latents_mean", "latents_std"):
        assert ours.vae_config is not None
        assert theirs.vae_config is not None
        assert ours.vae_config[name] == theirs.vae_config[name]
    encoder, expected = ours.text_encoder_config, theirs.text_encoder_config
    assert encoder is not None
    assert expected is not None
    for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size", "relative_attention_num_buckets"):
        assert encoder[name] == expected[name]


def test_what_wans_configuration_says_is_kept(original: Path, plain: Path, tmp_path: Path, cli: Run) -> None:
    result = cli("init", original, "-o", tmp_path / "made", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    made = opened(tmp_path / "made")
    assert json.loads(result.stdout)["components"]["vae"] == "written"
    assert made.model.transformer == opened(plain).model.transformer
    assert made.model.text_length == 64
    assert same(values(made), values(opened(plain)))


def test_copies_are_whole(original: Path, tmp_path: Path, cli: Run) -> None:
    result = cli("init", original, "-o", tmp_path / "made", "--copy", "--quiet")
    assert result.exit_code == 0, result.output
    assert not [path for path in (tmp_path / "made").rglob("*") if path.is_symlink()]
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_first_frame_vector_makes_a_pyramidal_model(
    make_checkpoint: Make, tmp_path: Path, cli: Run, ending: str
) -> None:
    whole = make_checkpoint()
    tensors = tensors_of(whole / "transformer", original_transformer)
    vector = {"module": tensors.pop("first_frame_embedding")[None, None]}
    save_file(tensors, tmp_path / "model.safetensors")
    extra = tmp_path / f"vector.{ending}"
    save_file(vector, extra) if ending == "safetensors" else torch.save(vector, extra)
    words = ["--first-frame-embedding", extra, "--heads", "4", "--stages", "2", "--axes", "HW", "--wavelet", "db2"]
    words += [
        "--schedule",
        "4-2:3.5",
        "--schedule",
        "few=1/0.6:1",
        "--first-frame",
        "joint",
        "--resolution",
        "17x64x64",
    ]
    result = cli("init", tmp_path / "model.safetensors", *words, "-o", tmp_path / "made", "--quiet")
    assert result.exit_code == 0, result.output
    made = opened(tmp_path / "made")
    expected = {name: read_tensor(entry) for name, entry in opened(whole).transformer.items()}
    assert same({name: read_tensor(entry) for name, entry in made.transformer.items()}, expected)
    model = made.model
    assert (model.pyramid.kind.name, model.pyramid.depth, model.pyramid.axes) == ("pyramidal", 2, "HW")
    assert (model.wavelet, model.default_schedule, list(model.schedules)) == ("db2", "4-2", ["4-2", "few"])
    assert model.schedules["4-2"].guidance_scale == 3.5
    assert not model.pyramid.first_frame_apart
    assert (tmp_path / "made/transformer/diffusion_pytorch_model-00001-of-00002.safetensors").is_symlink()


@pytest.mark.parametrize("own", [True, False])
def test_patch_layers_make_a_ppf_model(make_checkpoint: Make, tmp_path: Path, cli: Run, own: bool) -> None:
    """The transformer's own layers are those of stage 0 unless the file has some for it."""
    whole = make_checkpoint("--kind", "ppf")
    tensors = tensors_of(whole / "transformer")
    layers = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("patch_embedding", "proj_out"))}
    for name in ("patch_embedding.0.weight", "patch_embedding.0.bias", "proj_out.0.weight", "proj_out.0.bias"):
        tensors[name.replace(".0.", ".")] = layers.pop(name) if own else torch.zeros_like(layers[name])
    save_file({original_transformer(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    save_file(
        {name.replace("proj_out", "head.head"): tensor for name, tensor in layers.items()}, tmp_path / "l.safetensors"
    )
    words = ["--patch-layers", tmp_path / "l.safetensors", "--heads", "4", "--json", "--quiet"]
    result = cli("init", tmp_path / "model.safetensors", *words, "-o", tmp_path / "made")
    assert result.exit_code == 0, result.output
    made, expected = opened(tmp_path / "made"), opened(whole)
    assert made.model.pyramid == expected.model.pyramid
    ours, theirs = ({n: read_tensor(e) for n, e in found.transformer.items()} for found in (made, expected))
    assert same(ours, theirs)
    assert len(json.loads(result.stdout)["left_out"]) == (0 if own else 4)


def test_a_lora_is_merged_into_what_is_written(plain: Path, tmp_path: Path, cli: Run) -> None:
    torch.manual_seed(0)
    layer = "diffusion_model.blocks.1.ffn.0"
    save_file(
        {f"{layer}.lora_down.weight": torch.randn(4, 64), f"{layer}.lora_up.weight": torch.randn(128, 4)},
        tmp_path / "lora.safetensors",
    )
    lora = f"{tmp_path / 'lora.safetensors'}:0.5"
    result = cli("init", plain, "--lora", lora, "-o", tmp_path / "made", "--quiet")
    assert result.exit_code == 0, result.output
    merged = merge_loras(opened(plain), [parse_lora(lora)])
    assert same(values(opened(tmp_path / "made")), values(merged))
    assert not same(values(merged), values(opened(plain)))


def test_a_sources_own_description_is_kept(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    source = make_checkpoint()
    result = cli("init", source, "-o", tmp_path / "made", "--negative-prompt", "blurred", "--quiet")
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads((folder / "pyramid.json").read_text()) for folder in (tmp_path / "made", source))
    assert ours == theirs | {"negative_prompt": "blurred"}


class Planted:
    """What a pickle would execute when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def with_code(path: Path, mark: Path) -> None:
    torch.save({"patch_embedding.weight": torch.zeros(2), "x": Planted(mark)}, path)


def with_an_object(path: Path, mark: Path) -> None:
    torch.save({"patch_embedding.weight": torch.zeros(2), "step": 7}, path)


def nested(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {"patch_embedding.weight": torch.zeros(2)}}, path)


def a_list(path: Path, mark: Path) -> None:
    torch.save([torch.zeros(2)], path)


def before_zip(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Planted(mark)}))


def with_a_module(path: Path, mark: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def by_a_later_protocol(path: Path, mark: Path) -> None:
    torch.save({"x": Planted(mark)}, path, pickle_protocol=4)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (with_code, "holds more than tensors (its pickle has posix.system)"),
        (with_an_object, "found 'step' of type int"),
        (nested, "found 'state_dict' of type dict"),
        (a_list, "found one list"),
        (before_zip, "no file of torch.save"),
        (with_a_module, "holds more than tensors (its pickle has torch.nn.modules.linear.Linear)"),
        (by_a_later_protocol, "holds more than tensors (its pickle has STACK_GLOBAL)"),
    ],
)
def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_executed(
    tmp_path: Path, refused: Refused, write: Callable[[Path, Path], None], words: str
) -> None:
    file = tmp_path / "model.pth"
    write(file, tmp_path / "executed")
    assert words in refused("init", file, "-o", tmp_path / "made")
    assert list(tmp_path.iterdir()) == [file]


def with_two_lists(archive: dict[str, bytes]) -> None:
    archive["other/data.pkl"] = archive["model/data.pkl"]


def cut(archive: dict[str, bytes]) -> None:
    archive["model/data/0"] = archive["model/data/0"][:4]


def without_a_record(archive: dict[str, bytes]) -> None:
    del archive["model/data/1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_two_lists, "expected one data.pkl, found 2"),
        (cut, "are not where torch.save puts them"),
        (without_a_record, "are not where torch.save puts them"),
        (lambda archive: None, "are not where torch.save puts them"),
    ],
)
def test_a_pickle_that_was_packed_again_is_refused(
    tmp_path: Path, refused: Refused, change: Callable[[dict[str, bytes]], None], words: str
) -> None:
    """PyTorch reckons where values lie, and would take others."""
    file = tmp_path / "model.pth"
    torch.save({"patch_embedding.weight": torch.ones(3), "patch_embedding.bias": torch.ones(2)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert words in refused("init", file, "-o", tmp_path / "made")
    with pytest.raises(UsageError, match=words):
        read_any_header(file)


def test_a_pickle_that_is_called_safetensors_is_named(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "model.safetensors"
    torch.save({"patch_embedding.weight": torch.ones(3)}, file)
    assert "is a file of torch.save, whatever its name says" in refused("init", file, "-o", tmp_path / "made")


@pytest.mark.parametrize("option", ["--vae", "--first-frame-embedding", "--patch-layers"])
def test_wherever_it_is_given(plain: Path, tmp_path: Path, refused: Refused, option: str) -> None:
    file = tmp_path / "model.pth"
    with_code(file, tmp_path / "executed")
    assert "holds more than tensors" in refused("init", plain, option, file, "-o", tmp_path / "made")
    assert list(tmp_path.iterdir()) == [file]


def test_refused(plain: Path, original: Path, single: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "made"

    def said(*words: Any) -> str:
        line = refused("init", *words, "-o", out, "--quiet")
        assert not out.exists()
        return line

    model = single / "model.safetensors"
    assert "does not exist" in said(tmp_path / "nothing")
    assert "give --heads" in said(model)
    assert "do not divide the width" in said(model, "--heads", "5")
    assert "holds no transformer" in said(single / "vae.safetensors")
    assert "expected the tensors of a vae, found those of text_encoder" in said(
        original, "--vae", single / "text.safetensors"
    )
    assert "--blocks says nothing beside a SOURCE" in said(plain, "--blocks", "1")
    assert "--heads says nothing beside --random" in said("--random", "tiny", "--heads", "4")
    assert "tensor 'first_frame_embedding' is missing" in said(plain, "--kind", "pyramidal")
    assert "expected one tensor" in said(plain, "--first-frame-embedding", model)
    assert "expected patch_embedding.STAGE.weight" in said(plain, "--patch-layers", model)
    assert "a schedule is STEPS" in said(plain, "--schedule", "often")
    assert "one or two guidance scales" in said(plain, "--schedule", "4:3,2,1")
    assert "numbers separated by commas" in said(plain, "--clean-levels", "0,x")
    assert "holds no tokenizer.json" in said(plain, "--tokenizer", tmp_path)
    twice = tmp_path / "twice"
    shutil.copytree(original, twice)
    shutil.copy(single / "model.safetensors", twice)
    assert "holds two transformers" in said(twice)
    (twice / "model.safetensors").unlink()
    (twice / "config.json").write_text(json.dumps(CONFIG | {"model_type": "i2v"}))
    assert "expected model_type t2v, found 'i2v'" in said(twice)


def test_wan22s_residual_vae_and_its_names(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    """The configuration of the VAE is read off its tensors too."""
    whole, source = make_checkpoint("--random", "tiny-ti2v"), tmp_path / "source"
    source.mkdir()
    save_file(tensors_of(whole / "transformer", original_transformer), source / "diffusion_pytorch_model.safetensors")
    torch.save(tensors_of(whole / "vae", original_residual_vae), source / "Wan2.2_VAE.pth")
    (source / "config.json").write_text(json.dumps(CONFIG | {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}))
    result = cli("init", source, "-o", tmp_path / "made", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["missing"] == ["text_encoder"]
    made, expected = opened(tmp_path / "made"), opened(whole)
    assert (made.model.family.name, made.resolution) == ("wan2.2-ti2v", expected.resolution)
    assert (made.model.transformer, made.model.decoders) == (expected.model.transformer, expected.model.decoders)
    theirs = {name: tensor for name, tensor in values(expected).items() if not name.startswith("text_encoder")}
    assert same(values(made), theirs)
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index["expand_timesteps"] is True


def test_the_two_networks_of_wan22s_repository(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    whole, source = make_checkpoint("--random", "tiny-a14b"), tmp_path / "source"
    for component, name in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        (source / name).mkdir(parents=True)
        save_file(
            tensors_of(whole / component, original_transformer),
            source / name / "diffusion_pytorch_model.safetensors",
        )
        (source / name / "config.json").write_text(json.dumps(CONFIG))
    result = cli("init", source, "-o", tmp_path / "made", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert {"boundary_ratio 0.875", "scheduler UniPC, shift 12"} <= set(json.loads(result.stdout)["assumed"])
    made, expected = opened(tmp_path / "made"), opened(whole)
    for component in ("transformer", "transformer_2"):
        ours, theirs = (
            {n: read_tensor(e) for n, e in found.components[component].items()} for found in (made, expected)
        )
        assert same(ours, theirs)
    assert made.model.schedules["40"] == expected.model.schedules["40"]
    assert made.model.pyramid.boundary == 0.875


def digests(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--copy"]])
def test_a_source_in_the_output_is_never_replaced(
    plain: Path, tmp_path: Path, refused: Refused, more: list[str]
) -> None:
    source = tmp_path / "both"
    shutil.copytree(plain, source)
    save_file({"alpha": torch.ones(1)}, source / "lora.safetensors")
    before = digests(source)
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    others = [plain, "--vae", source / "vae" / weights.name], [plain, "--lora", source / "lora.safetensors"]
    for given in ([source], [weights, "--heads", "4"], *others):
        assert "which would be replaced" in refused("init", *given, "-o", source, "--force", *more)
    assert digests(source) == before
    assert list(tmp_path.iterdir()) == [source]


def test_a_plain_models_own_schedules_keep_its_scheduler(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    source = make_checkpoint("--random", "tiny-a14b")
    words = ("--schedule", "8:4,3", "--schedule", "few=1,0.9,0.5", "--resolution", "17x64x64", "--quiet")
    assert cli("init", source, *words, "-o", tmp_path / "made").exit_code == 0
    eight, few = opened(tmp_path / "made").model.schedules.values()
    assert (eight.shift, eight.solver.name, eight.guidance_scale, eight.guidance_scale_2) == (12.0, "unipc", 4.0, 3.0)
    assert (few.solver.name, few.guidance_scale, few.guidance_scale_2) == ("unipc", 1.0, None)


def test_a_shift_is_that_of_every_schedule(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    assert cli("init", make_checkpoint(), "--shift", "3", "-o", tmp_path / "made", "--quiet").exit_code == 0
    assert {entry.shift for entry in opened(tmp_path / "made").model.schedules.values()} == {3.0}


def test_of_several_pickles_the_plain_one_is_read(plain: Path, tmp_path: Path, cli: Run, refused: Refused) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    (file,) = (source / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    torch.save(
        {name: 2 * tensor for name, tensor in tensors.items()}, file.with_name("diffusion_pytorch_model.fp16.bin")
    )
    torch.save({"exp_avg": torch.zeros(2)}, file.with_name("optimizer.bin"))
    for variant, factor in (((), 1), (("--variant", "fp16"), 2)):
        out = tmp_path / f"made{factor}"
        assert cli("init", source, *variant, "-o", out, "--quiet").exit_code == 0
        name, expected = next(iter(tensors.items()))
        assert torch.equal(read_tensor(opened(out).transformer[name]), factor * expected)
    torch.save(tensors, file.with_name("another.bin"))
    assert "holds several pickles" in refused("init", source, "-o", tmp_path / "made")


def test_shards_of_a_pickle_in_a_repository(plain: Path, tmp_path: Path, cli: Run, refused: Refused) -> None:
    tensors = tensors_of(plain / "transformer", original_transformer)
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({n: tensors[n] for n in part}, tmp_path / f"diffusion_pytorch_model-{index:05d}-of-00002.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert cli("init", tmp_path, "-o", tmp_path / "made", "--quiet").exit_code == 0
    assert same(
        {n: read_tensor(e) for n, e in opened(tmp_path / "made").transformer.items()},
        {n: read_tensor(e) for n, e in opened(plain).transformer.items()},
    )
    shutil.rmtree(tmp_path / "made")
    one, other = sorted(tmp_path.glob("*.bin"))
    other.write_bytes(one.read_bytes())
    assert "is also in another shard" in refused("init", tmp_path, "-o", tmp_path / "made", "--quiet")


def test_pyramids_of_two_networks_from_parts(make_checkpoint: Make, tmp_path: Path, cli: Run) -> None:
    source, vector = make_checkpoint("--random", "tiny-a14b"), tmp_path / "vector.pt"
    torch.save(torch.rand(64), vector)  # a tensor by itself
    words = [
        word for part in ("transformer", "transformer_2") for word in ("--first-frame-embedding", f"{part}={vector}")
    ]
    result = cli("init", source, *words, "--resolution", "17x64x64", "-o", tmp_path / "made", "--quiet")
    assert result.exit_code == 0, result.output
    made = opened(tmp_path / "made")
    assert (made.model.pyramid.kind.name, made.model.experts) == ("pyramidal", 2)


def test_a_file_is_a_pickle_by_its_content_too(single: Path, plain: Path, tmp_path: Path, cli: Run) -> None:
    """A single file in a component's place is read where its tensors lie; `init` reads it as well."""
    file = tmp_path / "model"
    torch.save(load_file(single / "model.safetensors"), file)
    assert cli("init", file, "--heads", "4", "-o", tmp_path / "made", "--quiet").exit_code == 0
    theirs, ours = (
        read_checkpoint(plain, rename=to_diffusers, files=Files(transformer=each), header=read_any_header).transformer
        for each in (file, single / "model.safetensors")
    )
    assert set(theirs) == set(ours)
    assert all(torch.equal(read_tensor(theirs[name]), read_tensor(ours[name])) for name in ours)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_tiny_decoder_beside_a_source_and_in_it(plain: Path, tmp_path: Path, cli: Run, ending: str) -> None:
    file = write_tiny_decoder(tmp_path / f"taew2_1.{ending}")
    for source, *given in ((plain, "--vae-decoder", file), (tmp_path / "made0",)):
        out = tmp_path / f"made{len(given) == 0:d}"
        assert cli("init", source, *given, "-o", out, "--quiet").exit_code == 0
        assert set(opened(out).model.decoders) == {"vae", "tiny_decoder"}
        assert not (out / "tiny_decoder" / "config.json").exists()


def test_a_link_to_nothing_is_named(single: Path, tmp_path: Path, cli: Run, refused: Refused) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(single / "model.safetensors", file)
    assert cli("init", file, "--heads", "4", "-o", tmp_path / "made", "--quiet").exit_code == 0
    file.unlink()
    assert f"leads to {file}, which is not there: put it back" in refused("inspect", tmp_path / "made")


def test_refused_in_the_sources_words(
    make_checkpoint: Make, plain: Path, single: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "made"
    save_file({"vector": torch.full((64,), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"vector": torch.zeros(64, dtype=torch.int64)}, tmp_path / "int.safetensors")
    model = single / "model.safetensors"
    mixed = load_file(model) | {f"vae.{name}": tensor for name, tensor in load_file(single / "vae.safetensors").items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    cases: dict[str, list[Any]] = {
        "are not finite": [plain, "--first-frame-embedding", tmp_path / "nan.safetensors"],
        "says how many heads there are": [plain, "--heads", "4"],
        "is of two transformers": [plain, "--boundary-ratio", "0.5"],
        "give --schedule for 2 too": [make_checkpoint(), "--stages", "2"],
        "has no transformer_2": [plain, "--patch-layers", f"transformer_2={model}"],
        "holds several components": [tmp_path / "mixed.safetensors"],
        str(single / "vae.safetensors"): [
            make_checkpoint("--random", "tiny-ti2v"),
            "--vae",
            single / "vae.safetensors",
        ],
    }
    for words, given in cases.items():
        assert words in refused("init", *given, "-o", out, "--quiet"), words
        assert not out.exists()


HELIOS = Resolution(9, 64, 128)


@pytest.mark.parametrize("preset", ["tiny-helios", "tiny-helios-distilled"])
def test_a_checkpoint_of_helios_is_made_of_itself(make_checkpoint: Make, tmp_path: Path, cli: Run, preset: str) -> None:
    """Sampled as its scheduler and its index say; what is made is a source again, of the same classes."""
    source = make_checkpoint("--random", preset, "--no-text-encoder", "--no-vae")
    for name, given in (("one", source), ("two", tmp_path / "one")):
        result = cli("init", given, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    theirs, ours = (read_checkpoint(folder, resolution=HELIOS) for folder in (source, tmp_path / "two"))
    assert ours.model == theirs.model
    assert same(values(ours), values(theirs))
    steps = plan(ours.model.pyramid, HELIOS, ours.model.schedule(), 2)
    assert Reference(ours).modules.follows_pipeline(ours, steps)
    indices = [json.loads((folder / "model_index.json").read_text()) for folder in (source, tmp_path / "two")]
    assert indices[0] == indices[1]


def test_a_lora_is_merged_into_helios_and_schedules_keep_how_they_are_guided(
    make_checkpoint: Make, tmp_path: Path, cli: Run, refused: Refused
) -> None:
    source = make_checkpoint("--random", "tiny-helios", "--no-text-encoder", "--no-vae")
    lora, layer = tmp_path / "lora.safetensors", "blocks.0.attn1.to_q"
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    save_file({f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}, lora)
    made = tmp_path / "made"
    result = cli("init", source, "--lora", lora, "--schedule", "3-2-2:4", "--kind", "clocked", "-o", made)
    assert result.exit_code == 0, result.output
    ours, theirs = (read_checkpoint(folder, resolution=HELIOS) for folder in (made, source))
    found, before = (read_tensor(own.transformer[f"{layer}.weight"]) for own in (ours, theirs))
    torch.testing.assert_close(found, before + up @ down)
    one, own = ours.model.schedule(), theirs.model.schedule()
    assert (one.name, one.guidance_scale) == ("3-2-2", 4.0)
    assert (one.solver, one.guidance) == (own.solver, own.guidance)
    for how in (("--kind", "plain"), ("--stages", 2, "--schedule", "1-1")):
        said = refused("init", source, *how, "-o", tmp_path / "none")
        assert "kind and stages of helios are its scheduler's" in said


def test_errors_name_the_sources_scheduler(make_checkpoint: Make, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "source"
    shutil.copytree(make_checkpoint("--random", "tiny-helios", "--no-text-encoder", "--no-vae"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gamma": 0.25}))
    assert f"{file}: HeliosScheduler with gamma 0.25" in refused("init", folder, "-o", tmp_path / "none")
