"""Train the demonstration checkpoint: a real pyramidal Wan model, small, on clips of moving shapes.

    python scripts/train_moving_shapes.py RUN -o CHECKPOINT [--device cuda]

The VAE comes first, then the latents of a pool of clips, then the transformer with its text encoder. Everything
is drawn from the seed and the step, so that a run that was killed goes on at the same loss. `--kind ppf
--parts CHECKPOINT` trains a PPF twin with the VAE and the text encoder of another checkpoint, and
`--distil CHECKPOINT` a student that takes few steps without guidance.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Spinning OpenMP threads beside any other work slow each step tenfold: wait instead. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from distillation import Distillation, Prompts, distil
from flow import band_pair, downsample, training_pair, upsample
from moving_shapes import PHRASINGS, SCENES
from pyrexport.runtime.files import file_digest
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.description import Model
from safetensors.torch import load_file, save_file
from shapes_checkpoint import DISTILLED, RESOLUTION, Components, describe, write_checkpoint
from shapes_text import Text, open_text, tokens_of
from stage_modules import bands_of, make_stages, start_from
from torch import nn
from train_shapes_vae import clips_of, encode_clips, load_vae, train_vae
from training_loop import Job, Loop, claim_run, random_of

DROP_PROMPT = 0.1


@torch.no_grad()
def make_pool(job: Job, vae: AutoencoderKLWan, count: int, *, trained: bool) -> dict[str, torch.Tensor]:
    """Normalised latents of a pool of clips, with their scenes and the statistics, cached in one file.

    A VAE that was trained before brings its own statistics.
    """
    file = job.run / "pool.safetensors"
    if not file.is_file():
        scenes, latents = [], []
        for start in range(0, count, 8):
            batch_scenes, video = clips_of(random_of(job.seed, "pool", start), min(8, count - start), job.device)
            scenes.append(torch.from_numpy(batch_scenes))
            latents.append(encode_clips(vae, video).mode().cpu())
            if start % 320 == 0:
                print(f"pool {start}/{count}", flush=True)
        x = torch.cat(latents)
        if trained:
            mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
        else:
            mean, std = x.mean((0, 2, 3, 4)), x.std((0, 2, 3, 4))
        x = (x - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        save_file(
            {"latents": x.half().contiguous(), "scenes": torch.cat(scenes), "mean": mean, "std": std},
            file.with_suffix(".partial"),
        )
        file.with_suffix(".partial").replace(file)
    return load_file(file)


def stage_latents(model: Model, x0: np.ndarray, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per stage, finest first: clean latents [N, C, T, H, W] and their low-pass part R↑(R↓(x0))."""
    pyramid, out = model.pyramid, []
    for stage in model.stages(RESOLUTION):
        coarse, low = [], []
        for group in stage.groups:
            part, axes = x0[:, :, group.frames], [axis + 1 for axis in group.axes]
            coarse.append(downsample(part, pyramid.taps, axes) if len(out) + 1 < pyramid.depth else part)
            low.append(upsample(coarse[-1], pyramid.taps, axes) if len(out) + 1 < pyramid.depth else part)
        pair = x0, np.concatenate(low, 2)
        out.append(tuple(torch.from_numpy(values).half().to(device) for values in pair))
        x0 = np.concatenate(coarse, 2)
    return out


def batches(
    stages: list[tuple[torch.Tensor, torch.Tensor]],
    scenes: torch.Tensor,
    batch: int,
    finest: int,
    random: np.random.Generator,
    model: Model,
) -> Iterator[tuple[int, Any, Any, torch.Tensor, torch.Tensor]]:
    """Per stage: index, input, target, natural levels [B] and prompts [B]."""
    device = stages[0][0].device
    for stage, (x0, low) in zip(model.stages(RESOLUTION), stages, strict=True):
        # A coarse stage has an eighth of the tokens, and decides what moves where: it gets more samples.
        count = batch * 4**stage.index if stage.index else finest
        pick = torch.from_numpy(random.integers(len(x0), size=count)).to(device)
        uniform = torch.from_numpy(random.uniform(0, 1, count)).float().to(device)
        level = stage.clean + uniform * (stage.noisy - stage.clean)
        shaped = level.view(-1, 1, 1, 1, 1)
        noise = torch.randn(count, *stage.latent, device=device)
        clean, low_pass = x0[pick].float(), low[pick].float()
        if model.pyramid.kind.own_patch_layers:
            depth = model.pyramid.depth
            path = model.stages(RESOLUTION), stage.index, bands_of(clean, depth), bands_of(noise, depth)
            pairs = [band_pair(*path, shaped)]
        else:
            pairs = [
                training_pair(g, stage, clean[:, :, g.frames], low_pass[:, :, g.frames], noise[:, :, g.frames], shaped)
                for g in stage.groups
            ]
        phrase = torch.from_numpy(random.integers(len(PHRASINGS), size=count)).to(device)
        prompt = scenes[pick] * len(PHRASINGS) + phrase
        prompt[torch.from_numpy(random.uniform(0, 1, count) < DROP_PROMPT).to(device)] = len(SCENES) * len(PHRASINGS)
        yield (
            stage.index,
            torch.cat([p[0] for p in pairs], 2),
            torch.cat([p[1] for p in pairs], 2),
            level,
            prompt,
        )


def train_transformer(
    job: Job, model: Model, pool: dict[str, torch.Tensor], text: Text, start: Path | None
) -> dict[str, dict[str, torch.Tensor]] | None:
    """The transformer and the text encoder: averaged weights by component, when all steps are taken."""
    torch.manual_seed(job.seed)
    modules, named = make_stages(model)
    if start is not None:
        start_from(start, named, model.pyramid.patch_sizes)
    for module in modules:
        module.to(job.device).train()
    encoder = text.encoder.to(job.device)
    parameters = {f"transformer/{name}": p for name, p in named.items()}
    if not text.frozen:
        parameters |= {f"text_encoder/{name}": p for name, p in encoder.named_parameters()}
    latents = stage_latents(model, pool["latents"].float().numpy(), job.device)
    scenes = pool["scenes"].to(job.device)
    ids, mask = tokens_of(text.tokenizer, job.device)
    loop = Loop(job.run / "transformer.pt", parameters, job.steps, 1e-3, job.deadline)

    def loss_of(step: int) -> torch.Tensor:
        random = random_of(job.seed, "transformer", step)
        torch.manual_seed(int(random.integers(2**62)))
        losses = []
        for index, x, target, level, prompt in batches(latents, scenes, job.batch, job.finest, random, model):
            unique, where = torch.unique(prompt, return_inverse=True)
            # On CPUs without 16-bit arithmetic, bfloat16 is a hundred times slower than float32.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                embedded = encoder(ids[unique], mask[unique]).last_hidden_state * mask[unique][..., None]
                velocity = modules[index](x, 1000 * level, embedded[where]).float()
            losses.append(nn.functional.mse_loss(velocity, target) / target.var().detach())
        return torch.stack(losses).mean()

    if not loop.run(loss_of, job.run / "log.jsonl"):
        return None
    out: dict[str, dict[str, torch.Tensor]] = {"transformer": {}, "text_encoder": {}}
    for name, tensor in loop.average.items():
        component, _, leaf = name.partition("/")
        out[component][leaf] = tensor
    return out | ({"text_encoder": dict(encoder.named_parameters())} if text.frozen else {})


def train_student(
    job: Job, model: Model, text: Text, teacher: Path, trajectories: int
) -> dict[str, dict[str, torch.Tensor]] | None:
    """A transformer that follows its model's schedule to where the teacher's own leads: weights by component."""
    (modules, weights), (student, parameters) = make_stages(model), make_stages(model)
    for named in (weights, parameters):
        start_from(teacher, named, model.pyramid.patch_sizes)
    for module in (*modules, *student):
        module.to(job.device).requires_grad_(module in student)
    ids, mask = tokens_of(text.tokenizer, job.device)
    with torch.no_grad():
        embedded = text.encoder.to(job.device)(ids, mask).last_hidden_state * mask[..., None]
    schedule = read_checkpoint(teacher).model.schedule()
    chains = Distillation(model, modules, student, Prompts(embedded), schedule, model.schedule())
    average = distil(job, chains, parameters, trajectories)
    return average and {"transformer": average, "text_encoder": dict(text.encoder.named_parameters())}


@dataclass(frozen=True)
class Sources:
    """Checkpoints that a training begins with, or takes components from."""

    parts: Path | None
    """VAE and text encoder are its, and frozen."""
    start: Path | None
    """The transformer begins as its own."""
    vae: Path | None
    """The VAE is this one."""
    teacher: Path | None
    """The transformer is distilled from its own."""

    @property
    def digests(self) -> dict[str, str | None]:
        """What they are, wherever they lie."""
        return {
            "parts": self.parts and digest_of(self.parts),
            "start": self.start and digest_of(self.start / "transformer"),
            "vae": self.vae and digest_of(self.vae),
            "teacher": self.teacher and digest_of(self.teacher / "transformer"),
        }


def check_request(output: Path, sources: Sources, device: str) -> None:
    """Refuse before hours of work what could not be finished.

    Raises:
        click.UsageError: the output is in the way, a folder is no checkpoint, or there is no such device.
    """
    if os.path.lexists(output):
        raise click.UsageError(f"{output} exists: a checkpoint is written to a new folder")
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"folder {output.parent} of the output does not exist; make it first")
    parts, vae = sources.parts, sources.vae
    if parts is not None and vae is not None:
        raise click.UsageError("--parts brings a VAE along: give either --parts or --vae")
    needed = [parts / name / "config.json" for name in ("vae", "text_encoder")] if parts else []
    for file in [*needed, *([vae / "config.json"] if vae else [])]:
        if not file.is_file():
            raise click.UsageError(f"{file} is missing: expected a folder that was written by this script")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"device '{device}' is not here: {str(error).splitlines()[0]}") from None


def digest_of(folder: Path) -> str:
    """What a folder's weights are, wherever it lies."""
    return "".join(file_digest(file)[:16] for file in sorted(folder.rglob("*.safetensors")))


def train(
    job: Job, model: Model, pool_size: int, trajectories: int, sources: Sources, vae_job: Job
) -> Components | None:
    """All components, each trained or taken from elsewhere; None when time was up before."""
    given = sources.vae or (sources.parts and sources.parts / "vae")
    vae = load_vae(given, job.device) if given else train_vae(vae_job)
    if vae is None:
        return None
    text = open_text(sources.parts, job.seed)
    if sources.teacher:
        mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
        trained = train_student(job, model, text, sources.teacher, trajectories)
    else:
        pool = make_pool(job, vae, pool_size, trained=given is not None)
        mean, std = pool["mean"], pool["std"]
        trained = train_transformer(job, model, pool, text, sources.start)
    if trained is None:
        return None
    return Components(**trained, umt5=text.encoder.config, tokenizer=text.tokenizer, vae=vae, mean=mean, std=std)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--kind", type=click.Choice(["pyramidal", "ppf"]), default="pyramidal", show_default=True)
@click.option(
    "--parts",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Take VAE and text encoder from this checkpoint, frozen.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Begin with the transformer of this checkpoint.",
)
@click.option(
    "--vae",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Take the VAE alone from this folder, and train the rest.",
)
@click.option(
    "--distil",
    "teacher",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkpoint whose kind and whose components but the transformer are kept: the student follows 2-2-1.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--vae-steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option("--vae-batch", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--pool",
    "pool_size",
    type=click.IntRange(8),
    default=1080,
    show_default=True,
    help="Clips whose latents are cached.",
)
@click.option(
    "--trajectories",
    type=click.IntRange(1),
    default=192,
    show_default=True,
    help="Of a teacher, drawn in each of three rounds: of stage 0; four times as many for each coarser one.",
)
@click.option("--steps", type=click.IntRange(1), default=6000, show_default=True)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Of stage 0; four times as many for each coarser one.",
)
@click.option("--finest", type=click.IntRange(1), help="Of stage 0 alone, where a start knows it already.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=math.inf, help="Stop, resumable, after this long."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    run: Path,
    output: Path,
    kind: str,
    parts: Path | None,
    start: Path | None,
    vae: Path | None,
    teacher: Path | None,
    device: str,
    vae_steps: int,
    vae_batch: int,
    pool_size: int,
    trajectories: int,
    steps: int,
    batch: int,
    finest: int | None,
    minutes: float,
    seed: int,
) -> None:
    """Train into RUN (again, to go on), and write the CHECKPOINT when done."""
    if teacher is not None and (parts or start or vae):
        raise click.UsageError("--distil takes everything from the teacher: give it alone")
    taught = teacher and read_checkpoint(teacher)
    sources = Sources(taught.folders["vae"].parent if taught else parts, start, vae, teacher)
    check_request(output, sources, device)
    model = describe(taught.model.pyramid.kind.name, DISTILLED) if taught else describe(kind)
    settings = {
        "kind": model.pyramid.kind.name,
        "seed": seed,
        "vae_steps": vae_steps,
        "vae_batch": vae_batch,
        "pool": pool_size,
        "trajectories": trajectories,
        "steps": steps,
        "batch": batch,
        "finest": finest or batch,
    }
    claim_run(run, settings | sources.digests)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    job = Job(run, device, seed, steps, batch, time.monotonic() + 60 * minutes, finest or batch)
    components = train(job, model, pool_size, trajectories, sources, replace(job, steps=vae_steps, batch=vae_batch))
    if components is None:
        print("time is up: run again to go on", flush=True)
        return
    write_checkpoint(output, model, components, sources.parts)
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
