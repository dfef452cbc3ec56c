"""Helios' checkpoints: tensors are diffusers' own, and what a folder says is read, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from click.testing import Result
from diffusers import HeliosTransformer3DModel
from pyrexport.runtime.chain.kinds import KINDS
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.families.helios import HELIOS, HeliosConfig

SIZE = Resolution(9, 64, 128)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "rope_dim": [8, 4, 4], "ffn_dim": 64}


@pytest.mark.parametrize(
    "own", [{}, {"is_amplify_history": True}, {"is_amplify_history": True, "history_scale_mode": "scalar"}]
)
def test_tensors_are_those_of_diffusers_class(own: dict[str, Any]) -> None:
    config = HeliosConfig.from_json(SMALL | own, "test")
    with init_empty_weights():
        theirs = HeliosTransformer3DModel(**SMALL, **own).state_dict()
    ours = HELIOS.transformer_tensors(config, KINDS["clocked"], ())
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_a_folder_needs_no_pyramid_json(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("--random", "tiny-helios-distilled")
    assert not (folder / "pyramid.json").exists()
    checkpoint = read_checkpoint(folder, resolution=SIZE)
    schedule = checkpoint.model.schedule()
    assert (schedule.name, schedule.solver.name, schedule.guidance_scale) == ("2-2-2", "dmd", 1.0)
    assert [stage.latent for stage in checkpoint.model.stages(SIZE)] == [(16, 3, 8, 16), (16, 3, 4, 8), (16, 3, 2, 4)]
    history = HELIOS.stage_inputs(checkpoint.model.transformer, checkpoint.model.stages(SIZE)[2], 512)["history"]
    assert history == (1, 16, 20, 8, 16)
    assert read_checkpoint(folder).resolution == Resolution(33, 384, 640)


@pytest.mark.parametrize(
    ("file", "field", "value", "said"),
    [
        ("scheduler/scheduler_config.json", "gamma", 0.25, "gamma 0.25 has no solver here: expected 0.333"),
        ("scheduler/scheduler_config.json", "stages", 1, "stages 1 has no solver here: expected 3"),
        ("scheduler/scheduler_config.json", "stage_range", [0, 1, 0.5, 1], "4 numbers that increase"),
        ("scheduler/scheduler_config.json", "stage_range", [0, 1e-4, 0.5, 1], "leave each stage one of 1000 timesteps"),
        ("scheduler/scheduler_config.json", "scheduler_type", "dmd", "one of unipc, euler"),
        ("model_index.json", "is_distilled", True, "expected false, beside a HeliosScheduler, found true"),
        ("model_index.json", "boundary_ratio", 0.9, "one network: leave out boundary_ratio, found 0.9"),
        ("model_index.json", "scheduler", ["diffusers", "UniPCMultistepScheduler"], "found UniPCMultistepScheduler"),
        ("transformer/config.json", "guidance_cross_attn", False, "expected guidance_cross_attn True, found False"),
        ("transformer/config.json", "guidance_cross_attn", "True", "expected guidance_cross_attn True, found 'True'"),
        (
            "transformer/config.json",
            "zero_history_timestep",
            False,
            "only Helios' published transformers are supported",
        ),
        ("transformer/config.json", "rope_dim", [8, 4, 2], "add up to attention_head_dim 16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    make_checkpoint: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    file: str,
    field: str,
    value: object,
    said: str,
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--random", "tiny-helios"), folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert said in refused("inspect", folder, "--resolution", SIZE)


def test_a_pyramid_json_of_another_kind_is_refused(
    make_checkpoint: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--random", "tiny-helios"), folder)
    plain = {"format": 1, "kind": "plain", "stages": 1, "resolution": vars(SIZE), "schedules": {"4": {"steps": [4]}}}
    (folder / "pyramid.json").write_text(json.dumps(plain))
    assert "field 'kind': expected one of clocked, found \"plain\"" in refused("inspect", folder)


def test_what_is_no_part_of_sampling_is_said(
    make_checkpoint: Callable[..., Path], cli: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--random", "tiny-helios-distilled"), folder)
    (folder / "transformer_ode").mkdir()
    found = cli("inspect", folder, "--resolution", SIZE, "--json")
    assert found.exit_code == 0
    assert found.stderr == f"Note: {folder / 'transformer_ode'} is no part of sampling, and is not read\n"


def test_sizes_are_those_of_three_stages(make_checkpoint: Callable[..., Path], refused: Callable[..., str]) -> None:
    folder = make_checkpoint("--random", "tiny-helios")
    assert "a multiple of 64, found 96" in refused("inspect", folder, "--resolution", "9x96x128")
    assert "1 + 4k, found 12" in refused("inspect", folder, "--resolution", "12x64x128")


def test_kinds_of_schedulers_are_not_chosen(refused: Callable[..., str], tmp_path: Path) -> None:
    for how in (("tiny-helios", "--kind", "plain"), ("tiny", "--kind", "clocked"), ("tiny-helios", "--stages", 2)):
        assert "leave out --kind, --stages" in refused("init", "--random", *how, "-o", tmp_path / "new")


@pytest.mark.parametrize(
    ("preset", "said"), [("tiny-helios-distilled", "1-1-1 (first chunk 2-2-2)"), ("tiny-helios", "1-1-1")]
)
def test_a_schedule_says_what_its_first_chunk_takes(
    make_checkpoint: Callable[..., Path], preset: str, said: str
) -> None:
    model = read_checkpoint(make_checkpoint("--random", preset), resolution=SIZE).model
    assert model.schedule("1-1-1").words == said
