"""Bad input is refused through the CLI with one line and exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    return folder


def change_weights(folder: Path, change, file: Path = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def change_pyramid(folder: Path, **fields) -> None:
    path = folder / "pyramid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_missing_tensor(copy, refused):
    change_weights(copy, lambda t: t.pop("blocks.1.attn2.to_k.bias"))
    line = refused("inspect", copy)
    assert "tensor 'blocks.1.attn2.to_k.bias' is missing: expected shape [64]" in line


def test_an_extra_tensor(copy, refused):
    change_weights(copy, lambda t: t.update(lora=t["scale_shift_table"].copy()))
    assert "unexpected tensor 'lora' of shape [1, 2, 64]" in refused("inspect", copy)


def test_a_misshaped_tensor(copy, refused):
    change_weights(copy, lambda t: t.update(first_frame_embedding=t["first_frame_embedding"][:32].copy()))
    assert "'first_frame_embedding' is misshaped: expected [64], found [32]" in refused("inspect", copy)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("change", ["missing", "extra", "misshaped"])
def test_wrong_tensors_of_the_other_parts(copy, refused, tmp_path, part, change):
    def edit(tensors):
        name = sorted(tensors)[0]
        tensor = tensors.pop(name)
        if change != "missing":
            tensors[name if change == "misshaped" else "extra"] = tensor[:1].copy() if tensor.ndim else tensor
        if change == "extra":
            tensors[name] = tensor

    change_weights(copy, edit, Path(part))
    line = refused("sample", copy, "--prompt", "a", "-o", tmp_path / "x.mp4", "--quiet")
    assert {"missing": "is missing", "extra": "unexpected tensor 'extra'", "misshaped": "is misshaped"}[change] in line
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"resolution": {"frames": 17, "height": 60, "width": 64}}, "impossible resolution 17x60x64"),
        ({"resolution": {"frames": 16, "height": 64, "width": 64}}, "number of frames"),
        ({"resolution": {"frames": 17, "height": 65536, "width": 64}}, "rope_max_seq_len"),
        ({"resolution": "big"}, "field 'resolution': expected an object"),
        ({"wavelet": "db99"}, "unknown wavelet 'db99'"),
        ({"wavelet": [1.0, 1.0]}, "not orthonormal"),
        ({"clean_levels": [0.0, 0.9, 0.5]}, "clean levels start at 0 and increase"),
        ({"clean_levels": [0.0, 0.5]}, "expected 3 levels"),
        (
            {"schedules": {"x": {"levels": [[1, 0.98, 0.99], [0.94], [0.58]]}}, "default_schedule": "x"},
            "must decrease",
        ),
        (
            {"schedules": {"x": {"levels": [[1, 0.5], [], []]}}, "default_schedule": "x"},
            "outside the range of stage 2",
        ),
        ({"schedules": {"x": {"steps": [2, 2]}}, "default_schedule": "x"}, "3 stage"),
        ({"schedules": {"x": {"steps": [2, 0, 1]}}, "default_schedule": "x"}, "steps per stage"),
        ({"schedules": {}}, "at least one schedule"),
        ({"default_schedule": "y"}, "field 'default_schedule': expected one of"),
        ({"kind": "cascade"}, "expected one of pyramidal, clocked, ppf, plain"),
        ({"kind": "ppf"}, "patch size"),
        ({"stages": 0}, "whole number from 1"),
        ({"format": 2}, "field 'format': expected 1"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"text_length": True}, "whole number"),
        ({"format": True}, "field 'format': expected a whole number"),
        ({"wavelet": [10**400, 1]}, "low-pass taps within -1"),
        ({"wavelet": ["0.7", "0.7"]}, "low-pass taps within -1"),
        ({"patch_sizes": [[1, 2, 2]]}, "field 'patch_sizes': expected null"),
        ({"resolution": {"frames": 17, "height": 64, "width": 64, "fps": 16}}, "unknown field 'fps'"),
        ({"axes": "HW", "resolution": {"frames": 1, "height": 64, "width": 64}}, "more than one frame"),
        ({"schedules": {"x": {"steps": [1, 1, 1], "shift": 1e20}}, "default_schedule": "x"}, "shift of a schedule"),
        ({"schedules": {"x": {"steps": [1, 1, 1], "levels": [[], [], []]}}, "default_schedule": "x"}, "found both"),
        ({"schedules": {"x": {"steps": [1, 1, 1], "guidance_scale": -3}}, "default_schedule": "x"}, "from 0 to 100"),
    ],
)
def test_a_pyramid_json_that_cannot_be(copy, refused, fields, words):
    change_pyramid(copy, **fields)
    line = refused("inspect", copy)
    assert words in line
    assert "pyramid.json" in line


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": 1}', "\udcff", "[" * 100_000])
def test_a_malformed_pyramid_json(copy, refused, text):
    (copy / "pyramid.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "pyramid.json" in refused("inspect", copy)


@pytest.mark.parametrize("levels", ["1,0.98,0.99/0.94/0.58", "1/0.94", "x", "1,0.5/0.94/0.58", "1/0.94,nan/0.58"])
def test_levels_on_the_command_line(tiny, refused, tmp_path, levels):
    refused("sample", tiny, "--prompt", "a", "-o", tmp_path / "x.mp4", "--levels", levels)


def test_a_pickle(copy, refused):
    (copy / WEIGHTS).rename(copy / "transformer" / "diffusion_pytorch_model.bin")
    assert "pickle (diffusion_pytorch_model.bin), which is never opened" in refused("inspect", copy)


@pytest.mark.parametrize("keep", [0, 5, 300, -1, -1000])
def test_a_truncated_file(copy, refused, keep):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:keep])
    line = refused("inspect", copy)
    assert "diffusion_pytorch_model.safetensors" in line
    assert "fetch it again" in line


def test_a_missing_shard(make_checkpoint, refused, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(make_checkpoint("--shard-bytes", "300000"), folder)
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in refused("inspect", folder)


def test_a_shard_outside_the_folder(make_checkpoint, refused, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(make_checkpoint("--shard-bytes", "300000"), folder)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(document["weight_map"], "../../other.safetensors")
    index.write_text(json.dumps(document))
    assert "same folder" in refused("inspect", folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "/nowhere"], "does not exist"),
        (["inspect", "{tiny}", "--resolution", "81x448"], "FRAMESxHEIGHTxWIDTH"),
        (["inspect", "{tiny}", "--resolution", "17x64x72"], "multiple of 64"),
        (["inspect", "{tiny}/transformer"], "give one, such as --resolution"),
        (
            ["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--schedule", "fast"],
            "unknown schedule 'fast'",
        ),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--schedule", "2-2"], "3 stage"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--seed", "-1"], "from 0"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.gif"], ".mp4"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/no/a.mp4", "--quiet"], "does not exist"),
        (["sample", "{out}", "--prompt", "a", "-o", "{out}/a.mp4"], "not a checkpoint"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/no/a.npy"], "does not exist"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/" + 300 * "a" + ".mp4"], "longer than 255 bytes"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--grid", "{out}/a.mp4"], "is a .png"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--grid", "{out}/no/a.png"], "does not exist"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.npy", "--grid"], "beside a video"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--guidance-scale", "nan"], "within 0 … 100"),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--schedule", ""], "unknown schedule"),
        (["sample", "{tiny}", "-o", "{out}/a.mp4"], "--prompt"),
        (["sample", "{tiny}", "--prompt", "a", "-o", ""], "is no output"),
        (
            ["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.npy", "--save-latents", "{out}/b.npy"],
            "holds the latents",
        ),
        (
            ["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--resident"],
            "leave out --resident (for bundles)",
        ),
        (
            ["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--prepack", "--resident"],
            "leave out --prepack, --resident",
        ),
        (
            ["parity", "--record", "{out}/t", "--reference", "{tiny}", "--vae-tile", "99x99", "--quiet"],
            "within the frame",
        ),
        (["parity", "--record", "{out}/t", "--reference", "{tiny}", "--seed", str(2**53)], "range"),
        (
            ["parity", "--record", "{out}/t", "--reference", "{tiny}", "--prompt", "a", "--prompts", "b"],
            "either --prompt",
        ),
        (["sample", "{tiny}", "--prompt", "a", "-o", "{out}/a.mp4", "--seed", "abc"], "abc"),
        (
            ["inspect", "{tiny}/text_encoder", "--resolution", "17x64x64"],
            "expected the configuration of a WanTransformer3DModel",
        ),
        (["inspect", "{tiny}", "--resolution", "9" * 5000 + "x1x1"], "FRAMESxHEIGHTxWIDTH"),
        (["export"], "No such command"),
    ],
)
def test_arguments_that_cannot_be(tiny, refused, tmp_path, arguments, words):
    filled = [a.replace("{tiny}", str(tiny)).replace("{out}", str(tmp_path)) for a in arguments]
    assert words in refused(*filled)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer/tokenizer.json", "{}", "is not a tokenizer"),
        ("text_encoder/config.json", {"num_heads": 0}, "no text_encoder can be built"),
        ("vae/config.json", {"dropout": "x"}, "no vae can be built"),
        ("vae/config.json", {"base_dim": "x"}, "field 'base_dim': expected a whole number"),
        ("vae/config.json", {"latents_std": [0.0] * 16}, "above 0"),
        ("transformer/config.json", {"attention_head_dim": 1, "num_attention_heads": 64}, "attention_head_dim is even"),
        ("transformer/config.json", {"num_layers": 2**31 - 1}, "at most 1000 blocks"),
        ("model_index.json", "{", "malformed"),
    ],
)
def test_a_part_that_no_library_can_build(copy, refused, tmp_path, file, text, words):
    path = copy / file
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    assert words in refused("sample", copy, "--prompt", "a", "-o", tmp_path / "x.mp4", "--quiet")


def test_two_names_of_one_tensor(copy, refused):
    change_weights(copy, lambda t: t.update({"blocks.0.self_attn.q.weight": t["blocks.0.attn1.to_q.weight"].copy()}))
    assert "two tensors stand for the same one" in refused("inspect", copy)


def test_an_output_that_is_a_folder_or_cannot_be_written(tiny, cli, tmp_path):
    (tmp_path / "a.mp4").mkdir()
    result = cli("sample", tiny, "--prompt", "a", "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert "is a folder" in result.stderr
    result = cli("inspect", "x" * 300)
    assert result.exit_code in (1, 2)
    assert len(result.stderr.splitlines()) == 1
