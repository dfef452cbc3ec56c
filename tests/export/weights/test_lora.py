"""LoRA files in the dialects that trainers write: against diffusers where it reads them, and against float64."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HeliosPyramidPipeline,
    HeliosTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from pyrexport.export.weights.edits import read_rows, read_tensor
from pyrexport.export.weights.lora import merge_loras, parse_lora, read_changes
from pyrexport.export.weights.names import to_diffusers
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from safetensors.torch import load_file, save_file
from support.building import LEAN, small_checkpoint

Make = Callable[..., Path]
Run = Callable[..., Result]
Tensors = dict[str, torch.Tensor]

RANK, BLOCKS = 4, 2
LAYERS = {
    **{f"self_attn.{n}": f"attn1.to_{n}" for n in "qkv"},
    **{f"cross_attn.{n}": f"attn2.to_{n}" for n in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Wan's names of a block's layers, and diffusers'."""
OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


@pytest.fixture(scope="module")
def plain(make_checkpoint: Make) -> Path:
    """A plain transformer of two blocks, whose tensors diffusers has too."""
    return make_checkpoint("--kind", "plain", *LEAN)


@pytest.fixture(scope="module")
def opened(plain: Path) -> Checkpoint:
    """The same, read."""
    return small_checkpoint(plain)


@pytest.fixture(scope="module")
def helios(make_checkpoint: Make) -> Checkpoint:
    """A transformer of Wan's layers, and some of its own."""
    folder = make_checkpoint("--random", "tiny-helios-distilled", *LEAN)
    return read_checkpoint(folder, resolution=Resolution(9, 64, 128), rename=to_diffusers)


def pairs(opened: Checkpoint, seed: int, outer: Mapping[str, str] = {}) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random up and down matrices by Wan's name of the layer."""
    random = torch.Generator().manual_seed(seed)
    layers = {f"blocks.{i}.{w}": f"blocks.{i}.{d}" for i in range(BLOCKS) for w, d in LAYERS.items()} | dict(outer)
    found = {}
    for wan, theirs in layers.items():
        out, into = opened.transformer[f"{theirs}.weight"].shape
        found[wan] = tuple(torch.randn(s, generator=random) * 0.1 for s in ((out, RANK), (RANK, into)))
    return found


def in_diffusers(wan: str) -> str:
    """Diffusers' name of a layer."""
    if wan in OUTER:
        return OUTER[wan]
    blocks, index, layer = wan.split(".", 2)
    return f"{blocks}.{index}.{LAYERS[layer]}"


def write(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A file of contiguous tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def comfy(opened: Checkpoint, seed: int) -> Tensors:
    """`diffusion_model.`, lora_A/B, biases of layers, and layers outside the blocks."""
    out = {}
    for name, (up, down) in pairs(opened, seed, OUTER).items():
        key = f"diffusion_model.{name}"
        out |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.diff_b": up[:, 0] * 0.3}
    # Diffusers wants either both layers of an embedding or none.
    for name in ("text_embedding.2", "time_embedding.0"):
        which = "text" if name.startswith("text") else "time"
        number = 2 if name.endswith("2") else 1
        shape = opened.transformer[f"condition_embedder.{which}_embedder.linear_{number}.weight"].shape
        key = f"diffusion_model.{name}"
        out |= {
            f"{key}.lora_B.weight": torch.ones(shape[0], RANK) / 50,
            f"{key}.lora_A.weight": torch.ones(RANK, shape[1]) / 50,
        }
    return out


def with_alpha(opened: Checkpoint, seed: int, spelled: Callable[[str], str], alpha: float) -> Tensors:
    """Pairs lora_down/up with an alpha."""
    out = {}
    for name, (up, down) in pairs(opened, seed).items():
        key = spelled(name)
        out |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}
    return out


def comfy_alpha(opened: Checkpoint, seed: int) -> Tensors:
    """`diffusion_model.` and dots."""
    return with_alpha(opened, seed, lambda name: f"diffusion_model.{name}", 2.0)


def kohya(opened: Checkpoint, seed: int) -> Tensors:
    """`lora_unet_` and underscores."""
    return with_alpha(opened, seed, lambda name: f"lora_unet_{name.replace('.', '_')}", 1.0)


def peft(opened: Checkpoint, seed: int) -> Tensors:
    """`transformer.` and diffusers' names."""
    out = {}
    for name, (up, down) in pairs(opened, seed, OUTER).items():
        key = f"transformer.{in_diffusers(name)}"
        out |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}
    return out


DIALECTS: dict[str, Callable[[Checkpoint, int], Tensors]] = {
    "comfy": comfy,
    "comfy with alpha": comfy_alpha,
    "kohya": kohya,
    "peft": peft,
}


def merged(opened: Checkpoint, *loras: str) -> dict[str, torch.Tensor]:
    """All tensors of the transformer, as they are read with LoRAs."""
    return {
        name: read_tensor(entry) for name, entry in merge_loras(opened, [*map(parse_lora, loras)]).transformer.items()
    }


def fused(plain: Path, loras: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The same by diffusers."""
    transformer = WanTransformer3DModel.from_pretrained(plain / "transformer")
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )
    return fused_by(pipeline, loras)


def fused_by(pipeline: Any, loras: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline's transformer, once LoRAs are loaded and fused into it."""
    names = []
    for index, file in enumerate(loras):
        names.append(f"lora{index}")
        pipeline.load_lora_weights(os.path.dirname(file), weight_name=os.path.basename(file), adapter_name=names[-1])
    pipeline.set_adapters(names, list(loras.values()))
    pipeline.fuse_lora(components=["transformer"], adapter_names=names)
    pipeline.unload_lora_weights()
    return {name: tensor.float() for name, tensor in pipeline.transformer.state_dict().items()}


def assert_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Equal up to the order of float32 sums."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor.double() - theirs[name].double()).norm() / theirs[name].double().norm()
        assert error <= 1e-6, name


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_equals_diffusers(plain: Path, opened: Checkpoint, tmp_path: Path, dialect: str, scale: float) -> None:
    file = write(tmp_path / "lora.safetensors", DIALECTS[dialect](opened, 1))
    ours = merged(opened, f"{file}:{scale}")
    assert_close(ours, fused(plain, {str(file): scale}))
    changed = [name for name, tensor in ours.items() if not torch.equal(tensor, read_tensor(opened.transformer[name]))]
    assert bool(changed) == (scale != 0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_on_helios_equals_diffusers(helios: Checkpoint, tmp_path: Path, dialect: str) -> None:
    file = write(tmp_path / "lora.safetensors", DIALECTS[dialect](helios, 1))
    transformer = HeliosTransformer3DModel.from_pretrained(helios.folder / "transformer")
    pipeline = HeliosPyramidPipeline(None, None, None, None, transformer)
    assert_close(merged(helios, f"{file}:0.5"), fused_by(pipeline, {str(file): 0.5}))


def test_two_at_once_equal_diffusers(plain: Path, opened: Checkpoint, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.safetensors", kohya(opened, 1)), write(tmp_path / "b.safetensors", peft(opened, 2))
    assert_close(merged(opened, f"{one}:0.7", f"{two}:-0.4"), fused(plain, {str(one): 0.7, str(two): -0.4}))


def test_alpha_of_diffusers_metadata(plain: Path, opened: Checkpoint, tmp_path: Path) -> None:
    modules = [in_diffusers(name) for name in pairs(opened, 1, OUTER)]
    adapter = {
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": modules,
        "alpha_pattern": {modules[0]: 3},
        "rank_pattern": {},
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in adapter.items()})}
    file = write(tmp_path / "lora.safetensors", peft(opened, 1), {"format": "pt"} | metadata)
    assert_close(merged(opened, str(file)), fused(plain, {str(file): 1.0}))


OTHER = {
    "base_model.model.blocks.0.attn1.to_q.lora_A.default.weight": "blocks.0.attn1.to_q",
    "transformer.blocks.0.attn1.to_q.lora_A": "blocks.0.attn1.to_q",
    "blocks.0.attn1.to_q_lora.down.weight": "blocks.0.attn1.to_q",
    "blocks.0.attn1.to_out.0.lora.down.weight": "blocks.0.attn1.to_out.0",
    "transformer.blocks.1.ffn.net.2.lora_linear_layer.down.weight": "blocks.1.ffn.net.2",
    "model.diffusion_model.blocks.1.ffn.0.lora_down.weight": "blocks.1.ffn.net.0.proj",
    "lora_unet_blocks_1_ffn_net_0_proj.lora_down.weight": "blocks.1.ffn.net.0.proj",
    "lora_unet_time_projection_1.lora_down.weight": "condition_embedder.time_proj",
    "lora_unet_condition_embedder_text_embedder_linear_1.lora_down.weight": "condition_embedder.text_embedder.linear_1",
    "patch_embedding.lora_down.weight": "patch_embedding",
}
"""Keys that diffusers does not read as they are, and the layers that they are of."""


@pytest.mark.parametrize("key", OTHER)
def test_other_spellings(opened: Checkpoint, tmp_path: Path, key: str) -> None:
    out, *into = opened.transformer[f"{OTHER[key]}.weight"].shape
    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(out, RANK, generator=random), torch.randn(RANK, *into, generator=random)
    other = key.replace("lora_A", "lora_B").replace("down", "up")
    file = write(tmp_path / "lora.safetensors", {key: down, other: up.view(out, RANK, *(1,) * (len(into) - 1))})
    name = f"{OTHER[key]}.weight"
    ours, before = merged(opened, f"{file}:0.5"), read_tensor(opened.transformer[name])
    expected = before.double() + 0.5 * (up.double() @ down.double().flatten(1)).view(before.shape)
    torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-6)
    others = [n for n, t in ours.items() if n != name and not torch.equal(t, read_tensor(opened.transformer[n]))]
    assert others == []


def test_whole_changes(opened: Checkpoint, tmp_path: Path) -> None:
    # Diffusers drops changes of norms, takes `head.head.diff` as half of a pair, and does not know `.diff_m`.
    targets = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight",
        "blocks.1.self_attn.q.diff": "blocks.1.attn1.to_q.weight",
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    random = torch.Generator().manual_seed(0)
    deltas = {key: torch.randn(opened.transformer[name].shape, generator=random) for key, name in targets.items()}
    file = write(tmp_path / "lora.safetensors", {f"diffusion_model.{key}": delta for key, delta in deltas.items()})
    ours = merged(opened, f"{file}:0.25")
    for key, name in targets.items():
        before = read_tensor(opened.transformer[name]).double()
        expected = before + 0.25 * deltas[key].double()
        assert float((ours[name].double() - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("transformer.patch_short.diff", "patch_short.weight"),
        ("diffusion_model.patch_mid.diff_b", "patch_mid.bias"),
        ("lora_unet_patch_long.diff", "patch_long.weight"),
        ("diffusion_model.head.diff_m", "norm_out.scale_shift_table"),
        ("transformer.norm_out.diff_m", "norm_out.scale_shift_table"),
        ("diffusion_model.blocks.0.norm3.diff", "blocks.0.norm2.weight"),
    ],
)
def test_layers_that_are_helios_own(helios: Checkpoint, tmp_path: Path, key: str, changed: str) -> None:
    file = write(tmp_path / "lora.safetensors", {key: torch.ones(helios.transformer[changed].shape)})
    for name, tensor in merged(helios, str(file)).items():
        torch.testing.assert_close(tensor, read_tensor(helios.transformer[name]) + (name == changed))


def test_rows_are_those_of_the_whole(opened: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", comfy(opened, 1))
    entries = merge_loras(opened, [parse_lora(str(file))]).transformer
    for entry in entries.values():
        whole = read_tensor(entry)
        parts = [read_rows(entry, start, min(3, len(whole) - start)) for start in range(0, len(whole), 3)]
        torch.testing.assert_close(torch.cat(parts).float(), whole, rtol=1e-6, atol=1e-7)


def test_what_is_reported(opened: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", comfy_alpha(opened, 1))
    found = merge_loras(opened, [parse_lora(f"{file}:0.5")])
    (report,) = read_changes(found)
    assert report["file"] == str(file)
    assert report["scale"] == 0.5
    assert len(report["layers"]) == BLOCKS * len(LAYERS)
    for layer in report["layers"]:
        before = read_tensor(opened.transformer[layer["tensor"]]).double()
        change = read_tensor(found.transformer[layer["tensor"]]).double() - before
        assert layer["rank"] == RANK
        assert layer["factor"] == 0.5 * 2 / RANK
        assert layer["relative_change"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-4)


BAD: dict[str, tuple[Tensors, str]] = {
    "of no use": ({"diffusion_model.blocks.0.self_attn.q.lora_C.weight": torch.ones(4)}, "lora_C"),
    "half a pair": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 64)}, "lora_A"),
    "an alpha alone": ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, "q.alpha"),
    "a block too many": (
        {"diffusion_model.blocks.9.self_attn.q.diff_b": torch.ones(64)},
        "blocks.9.self_attn.q.diff_b",
    ),
    "another width": ({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(65)}, r"\[65\]: expected \[64\]"),
    "DoRA": ({"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(64)}, "DoRA"),
    "LoHa": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(64)}, "LoHa"),
    "LoKr": ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(64)}, "LoKr"),
    "an image model's": ({"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(64)}, "k_img"),
    "another component's": ({"lora_te_text_model.alpha": torch.tensor(1.0)}, "lora_te"),
    "the second expert's": ({"transformer_2.blocks.0.attn1.to_q.diff_b": torch.ones(64)}, "transformer_2"),
    "integers": ({"transformer.blocks.0.attn1.to_q.diff_b": torch.ones(64, dtype=torch.int32)}, "int32"),
    "nothing": ({}, "no tensor"),
    "image layers alone": ({"diffusion_model.img_emb.proj.1.diff_b": torch.zeros(64)}, "changes nothing"),
    "two spellings": (
        {"diffusion_model.head.head.diff_b": torch.ones(64), "transformer.proj_out.diff_b": torch.ones(64)},
        "'head.head.bias' and 'proj_out.bias' are one tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(opened: Checkpoint, tmp_path: Path, case: str) -> None:
    tensors, words = BAD[case]
    file = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(UsageError, match=words):
        merge_loras(opened, [parse_lora(str(file))])


def test_zeros_of_an_image_model_change_nothing(opened: Checkpoint, tmp_path: Path) -> None:
    key = "diffusion_model.blocks.0.cross_attn.k_img"
    pair = {f"{key}.lora_B.weight": torch.zeros(64, RANK), f"{key}.lora_A.weight": torch.ones(RANK, 64)}
    file = write(tmp_path / "lora.safetensors", comfy(opened, 1) | pair)
    assert len(read_changes(merge_loras(opened, [parse_lora(str(file))]))[0]["layers"]) > 0


def test_the_same_file_twice_is_refused(opened: Checkpoint, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", kohya(opened, 1))
    with pytest.raises(UsageError, match="given twice"):
        merge_loras(opened, [parse_lora(f"{file}:0.5"), parse_lora(str(file))])


def test_a_file_and_its_scale(tmp_path: Path) -> None:
    file = write(tmp_path / "a b:2.safetensors", {"x": torch.ones(1)})
    assert parse_lora(str(file)).scale == 1.0
    assert parse_lora(f"{file}:-0.5").scale == -0.5
    for text in (f"{file}:much", f"{file}:nan", str(tmp_path / "no.safetensors"), f"{tmp_path / 'no.safetensors'}:1"):
        with pytest.raises(UsageError):
            parse_lora(text)


def test_from_build_to_parity(
    make_checkpoint: Make, tmp_path: Path, cli: Run, refused: Callable[..., str], opened: Checkpoint
) -> None:
    # The tiny pyramidal transformer has the plain one's layers.
    tiny = make_checkpoint(*LEAN)
    file = write(tmp_path / "style.safetensors", comfy(opened, 1))
    command = ["build", str(tiny), "--target", "ort", "-o", str(tmp_path / "bundle"), "--quiet", "--json"]
    document: dict[str, Any] = json.loads(cli(*command, "--lora", f"{file}:0.5").stdout)
    assert document["loras"][0]["scale"] == 0.5
    parity = ["parity", str(tmp_path / "bundle"), "--reference", str(tiny), "--quiet", "--schedule", "2-2-1"]
    proved = cli(*parity, "--lora", f"{file}:0.5")
    assert proved.exit_code == 0, proved.output
    assert "--lora style.safetensors:0.5, found none" in refused(*parity)
    assert "found style.safetensors:1" in refused(*parity, "--lora", str(file))
    assert "whose weights are fixed" in refused("inspect", str(tmp_path / "bundle"), "--lora", str(file))


def test_on_eight_bit_floats(plain: Path, tmp_path: Path, opened: Checkpoint) -> None:
    """A scale comes before a change."""
    from support.scales import write_scaled

    folder = write_scaled(plain, tmp_path / "checkpoint")
    base = small_checkpoint(folder)
    file = write(tmp_path / "lora.safetensors", peft(opened, 1))
    name = "blocks.0.attn1.to_q.weight"
    tensors = load_file(file)
    up, down = (tensors[f"transformer.blocks.0.attn1.to_q.lora_{half}.weight"].double() for half in "BA")
    expected = read_tensor(base.transformer[name]).double() + up @ down
    torch.testing.assert_close(merged(base, str(file))[name].double(), expected, rtol=1e-5, atol=1e-6)
