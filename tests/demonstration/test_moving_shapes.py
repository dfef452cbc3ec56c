"""The demonstration's data, its judge and its training script."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import DATA, SCRIPTS
from distillation import Distillation, Prompts, renoise, solve
from judge_shapes import judge, scores
from moving_shapes import COLOURS, DIRECTIONS, SCENES, SHAPES, draw, prompts, render
from pyrexport.export.init.tokenizer import make_tokenizer
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.chain.noise import generator
from pyrexport.runtime.chain.plan import plan
from pyrexport.runtime.chain.sampler import guided_velocity, transition
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.proof.metrics import distance
from train_moving_shapes import main as train
from train_shapes_vae import VAE, AutoencoderKLWan, decode_clips, encode_clips, load_vae, over_whole_clips
from training_loop import Loop


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """A real clip of each scene, as 8-bit frames."""
    indices = np.arange(len(SCENES))
    video = render(indices, torch.from_numpy(draw(np.random.default_rng(5), indices)))
    return list((127.5 * (video + 1)).round().byte().permute(0, 2, 3, 4, 1).numpy())


def test_there_is_a_prompt_for_each_scene() -> None:
    """They are 72 different ones, each with its three words."""
    assert len(set(prompts())) == len(SCENES) == 72
    for scene, prompt in zip(SCENES, prompts(), strict=True):
        assert all(word in prompt for word in (scene.shape, scene.colour, scene.direction))


def test_shapes_stay_whole_and_in_size() -> None:
    """They are 24 to 44 pixels wide, and inside every frame."""
    indices = np.random.default_rng(0).integers(len(SCENES), size=2000)
    radius, x, y, dx, dy = draw(np.random.default_rng(1), indices).T
    assert radius.min() == pytest.approx(12, abs=0.1)
    assert radius.max() == pytest.approx(22, abs=0.1)
    for place, step in ((x, dx), (y, dy)):
        ends = np.stack([place, place + 16 * step])
        assert (ends - radius).min() >= 0
        assert (ends + radius).max() <= 128


def test_real_clips_are_judged_right(clips: list[np.ndarray]) -> None:
    """Every one is, in every attribute; a mask of pixels leaves 2 % of an ideal outline of 24 pixels."""
    found = scores(clips[::4], list(SCENES[::4]))
    assert found.pop("overlap") >= 0.98
    assert set(found.values()) == {1}


@pytest.mark.parametrize(
    ("attribute", "words"), [("colour", list(COLOURS)), ("direction", list(DIRECTIONS)), ("shape", list(SHAPES))]
)
def test_clips_of_something_else_are_judged_wrong(clips: list[np.ndarray], attribute: str, words: list[str]) -> None:
    """None passes that is of another colour or shape, or goes another way."""
    some, clips = SCENES[::9], clips[::9]
    for shift in range(1, len(words)):
        others = [
            replace(s, **{attribute: words[(words.index(getattr(s, attribute)) + shift) % len(words)]}) for s in some
        ]
        found = scores(clips, others)
        assert found[attribute] == found["all"] == 0


def test_noise_and_still_pictures_show_nothing(clips: list[np.ndarray]) -> None:
    """The judge does not guess."""
    noise = np.random.default_rng(0).integers(0, 256, clips[0].shape, dtype=np.uint8)
    assert judge(np.full_like(noise, 20))[0].shape == "none"
    assert judge(np.repeat(clips[0][:1], 17, axis=0))[0].direction == "none"
    assert judge(noise)[0].direction == "none"


def test_the_vae_over_whole_clips_is_diffusers_own() -> None:
    """Training's shortcut gives the numbers of the chunked passes; float32 rounding leaves 1e-5 of values near 1."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE).eval()
    video = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        frames = vae.decode(latents).sample
        over_whole_clips(vae)
        assert torch.allclose(encode_clips(vae, video).mode(), latents, atol=1e-5)
        assert torch.allclose(decode_clips(vae, latents).clamp(-1, 1), frames, atol=1e-4)


def test_clips_survive_the_trained_vae(clips: list[np.ndarray]) -> None:
    """A clip of every shape, colour and direction, encoded and decoded, is judged as what it is."""
    vae = load_vae(DATA / "moving-shapes" / "vae", "cpu")
    decoded: list[np.ndarray] = []
    with torch.no_grad():
        for start in range(0, len(clips), 25):
            chosen = np.stack(clips[start : start + 25 : 5])
            video = torch.from_numpy(chosen).permute(0, 4, 1, 2, 3) / 127.5 - 1
            frames = decode_clips(vae, encode_clips(vae, video).mode()).clamp(-1, 1)
            decoded.extend((127.5 * (frames + 1)).round().byte().permute(0, 2, 3, 4, 1).numpy())
    assert scores(decoded, list(SCENES[::5]))["all"] == 1


def test_a_corpus_has_one_tokenizer() -> None:
    """A run that was stopped trains it again: other ids would undo what the text encoder has learned."""
    first, second = (make_tokenizer(prompts(), 256).to_str() for _ in range(2))
    assert first == second
    assert make_tokenizer(prompts()[::2], 256).to_str() != first


def test_a_stopped_loop_goes_on_at_the_same_loss(tmp_path: Path) -> None:
    """After a stop at any step, the rest is bit for bit that of a run without one."""

    def train(file: str, stops: list[float]) -> dict[str, list[float]]:
        losses: list[float] = []
        for deadline in stops:
            torch.manual_seed(0)
            layer = torch.nn.Linear(4, 4)
            loop = Loop(tmp_path / file, dict(layer.named_parameters()), 60, 1e-2, deadline)

            def loss_of(step: int, layer: torch.nn.Linear = layer, loop: Loop = loop) -> torch.Tensor:
                if step == 23 and loop.deadline < np.inf:
                    loop.deadline = -1.0
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                loss = (layer(x) - x.flip(1)).square().mean()
                losses.append(loss.item())
                return loss

            loop.run(loss_of, tmp_path / "log.jsonl")
        return {"losses": losses, "average": loop.average["weight"].flatten().tolist()}

    whole = train("whole.pt", [np.inf])
    assert train("stopped.pt", [time.monotonic() + 1e6, np.inf]) == whole
    assert whole["losses"][-1] < 0.9 * whole["losses"][0]


def test_the_training_script_makes_a_checkpoint(cli: Callable[..., Result], tmp_path: Path) -> None:
    """After a few steps of everything, the result opens, and weighs what the demonstration does."""
    command = [sys.executable, str(SCRIPTS / "train_moving_shapes.py"), str(tmp_path / "run"), "-o"]
    few = ["--vae-steps", "1", "--vae-batch", "1", "--pool", "8", "--steps", "2", "--batch", "1", "--device", "cpu"]
    subprocess.run([*command, str(tmp_path / "out"), *few], check=True, capture_output=True)
    result = cli("inspect", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["kind"] == "pyramidal"
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()) < 16_000_000
    for out, arguments, words in (
        ("out", [], "exists"),
        ("new", ["--seed", "7"], "was begun with seed 0"),
        ("new", ["--parts", str(tmp_path / "run")], "is missing"),
        ("new", ["--device", "foo"], "is not here"),
    ):
        found = CliRunner().invoke(train, [*command[2:], str(tmp_path / out), *few, *arguments])
        assert found.exit_code == 2
        assert words in found.stderr.splitlines()[-1]
    twin = [*command, str(tmp_path / "ppf"), *few, "--kind", "ppf", "--parts", str(tmp_path / "out")]
    twin[2] = str(tmp_path / "ppf-run")
    subprocess.run(twin, check=True, capture_output=True)
    assert json.loads(cli("inspect", tmp_path / "ppf", "--json").output)["kind"] == "ppf"
    student = [str(tmp_path / "student-run"), "-o", str(tmp_path / "student"), "--distil", str(tmp_path / "ppf")]
    given = [*student, "--steps", "2", "--batch", "1", "--trajectories", "1", "--device", "cpu"]
    result = CliRunner().invoke(train, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(cli("inspect", tmp_path / "student", "--json").output)
    assert found["kind"] == "ppf"
    assert list(read_checkpoint(tmp_path / "student").model.schedules) == ["2-2-1"]


def test_trajectories_are_those_of_the_chain() -> None:
    """Guided, batched and in parts, against the reference in the runtime's own chain: but for the order of sums."""
    checkpoint = read_checkpoint(DATA / "moving-shapes")
    model, reference = checkpoint.model, Reference(checkpoint)
    steps = [step for step in plan(model.pyramid, checkpoint.resolution, model.schedule()) if step.stage.index == 2]
    text = torch.from_numpy(reference.encode(["a red circle moving left", "a blue square moving up", ""]))
    chains = Distillation(model, reference.stages, reference.stages, Prompts(text), model.schedule(), model.schedule())
    x, prompts = torch.randn(3, *steps[0].stage.latent), torch.tensor([0, 1, 0])
    guided = chains.prompts.velocity(reference.stages[2], model.schedule().guidance_scale)
    states = solve(steps[0].stage, chains.levels(model.schedule(), steps[0].stage), guided, x, prompts)
    for index, prompt in enumerate(prompts):
        latent, solver = x[index].numpy(), steps[0].solver.start()
        words = {"text": text[prompt].numpy()}, {"text": text[-1].numpy()}
        for step, state in zip(steps, states, strict=True):
            latent = solver(step, latent, guided_velocity(reference, step, latent, *words), generator(0))
            assert distance(state[index].numpy(), latent).relative_l2 < 1e-5
    drawn = renoise(model, steps[0].stage, states[-1], generator(1))
    assert drawn.shape[1:] == model.stages(checkpoint.resolution)[1].latent
    one = renoise(model, steps[0].stage, states[-1][:1], generator(1))[0].numpy()
    assert (
        distance(one, transition(model.pyramid.taps, steps[-1], states[-1][0].numpy(), generator(1))).relative_l2 < 1e-6
    )
