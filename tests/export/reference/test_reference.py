"""The PyTorch reference and `sample CHECKPOINT`."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from pyrexport.export.families.wan.modules import load_transformer
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.model.checkpoint import read_checkpoint
from safetensors.numpy import load_file, save_file
from support.originals import original_transformer


def luma(image):
    """Brightness as H.264 keeps it, of pixels [h, w, 3]: [h·w]."""
    return (image @ np.array([0.299, 0.587, 0.114])).ravel()


def test_sample_writes_a_video_and_a_contact_sheet(tiny, cli, tmp_path):
    result = cli("sample", tiny, "--prompt", "a cat", "-o", tmp_path / "a.mp4", "--grid", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["files"] == [str(tmp_path / "a.mp4"), str(tmp_path / "a.png")]
    with av.open(str(tmp_path / "a.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert np.shape(frames) == (17, 64, 64, 3)
    with av.open(str(tmp_path / "a.png")) as sheet:
        (image,) = [frame.to_ndarray(format="rgb24") for frame in sheet.decode(video=0)]
    assert image.shape == (66, 6 * 66, 3)
    # The clip is noise, of which H.264 keeps the brightness and halves the resolution of the colour.
    first, *others = [np.corrcoef(luma(image[1:65, 1:65]), luma(frame))[0, 1] for frame in frames]
    assert first > 0.9 > max(others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]


@pytest.mark.parametrize("kind", ["pyramidal", "ppf", "plain"])
def test_one_seed_gives_identical_latents(make_checkpoint, cli, tmp_path, kind):
    folder = make_checkpoint("--kind", kind)
    common = ["--prompt", "a cat", "--quiet", "--resolution", "17x64x64"]
    common += ["--schedule", "4"] if kind == "plain" else []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = cli("sample", folder, "-o", tmp_path / f"{name}.npy", "--seed", seed, *common)
        assert result.exit_code == 0, result.output
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert a.shape == (16, 5, 8, 8)
    assert np.isfinite(a).all()
    assert np.array_equal(a, b)
    assert not np.allclose(a, c)


def velocity(checkpoint, index, latent, timestep, text):
    """The reference's, of a stage at a timestep."""
    stage = checkpoint.model.stages(checkpoint.resolution)[index]
    step = single_step(checkpoint.model.pyramid, stage, timestep / 1000)
    assert step.timestep == timestep
    return Reference(checkpoint).velocity(step, latent, {"text": text})


@pytest.mark.filterwarnings("error")
def test_the_first_frame_embedding_reaches_the_first_frame(make_checkpoint, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(make_checkpoint(), folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    latent = np.random.default_rng(0).standard_normal((16, 3, 4, 4)).astype(np.float32)
    text = np.zeros((64, 32), np.float32)
    latent.flags.writeable = text.flags.writeable = False  # as arrays are that a worker was sent: torch warns of them
    before = velocity(read_checkpoint(folder), 1, latent, 700.0, text)
    save_file(tensors | {"first_frame_embedding": 3 * tensors["first_frame_embedding"][::-1].copy()}, file)
    after = velocity(read_checkpoint(folder), 1, latent, 700.0, text)
    change = np.abs(after - before).mean(axis=(0, 2, 3))
    assert change[0] > 3 * change[1:].max()  # the other frames see it through attention alone


def test_wans_original_names_are_read_through_diffusers_conversion(tiny, tmp_path, cli):
    folder = tmp_path / "original"
    shutil.copytree(tiny, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({original_transformer(name): tensor for name, tensor in tensors.items()}, file)
    out = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for source, path in zip((tiny, folder), out, strict=True):
        assert cli("sample", source, "--prompt", "a", "-o", path, "--quiet").exit_code == 0
    # Another order of tensors in the file is another alignment of the mapped weights, and so another order of sums.
    assert np.allclose(*map(np.load, out), rtol=0, atol=1e-5)


def test_shards_are_read_like_one_file(make_checkpoint):
    whole, sharded = (read_checkpoint(make_checkpoint(*a)) for a in ((), ("--shard-bytes", "300000")))
    assert len({entry.file for entry in sharded.transformer.values()}) > 2
    a, b = (load_transformer(checkpoint)[0].state_dict() for checkpoint in (whole, sharded))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_activations_of_random_checkpoints_stay_in_range(make_checkpoint):
    checkpoint = read_checkpoint(make_checkpoint("--blocks", "12", "--width", "128"))
    text = Reference(checkpoint).encode(["a cat"])[0]
    shape = checkpoint.model.stages(checkpoint.resolution)[1].latent
    latent = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert 0.2 < velocity(checkpoint, 1, latent, 800.0, text).std() < 5
    assert 0.1 < text[text.any(axis=-1)].std() < 5


def test_parts_may_be_absent(make_checkpoint, refused, tmp_path):
    folder = make_checkpoint("--no-vae")
    assert "only latents" in refused("sample", folder, "--prompt", "a", "-o", tmp_path / "a.mp4")
    folder = make_checkpoint("--no-text-encoder")
    assert "prompt_embeds" in refused("sample", folder, "--prompt", "a", "-o", tmp_path / "a.mp4")
    assert Reference(read_checkpoint(folder)).decode(np.zeros((16, 2, 8, 8), np.float32)).shape == (5, 64, 64, 3)


def test_a_resolution_replaces_the_checkpoints_own(tiny):
    checkpoint = read_checkpoint(tiny, resolution=Resolution(33, 64, 128))
    assert checkpoint.resolution == Resolution(33, 64, 128)
    assert checkpoint.model.stages(checkpoint.resolution)[2].latent == (16, 3, 2, 4)
