"""Train the demonstration checkpoint: a real pyramidal Wan model, small, on clips of moving shapes.

    python scripts/train_moving_shapes.py RUN -o CHECKPOINT [--device cuda]

The VAE comes first, then the latents of a pool of clips, then the transformer with its text encoder. Everything
is drawn from the seed and the step, so that a run that was killed goes on at the same loss. `--kind ppf
--parts CHECKPOINT` trains a PPF twin with the VAE and the text encoder of another checkpoint.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# Spinning OpenMP threads beside any other work slow each step tenfold: wait instead. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from make_random_checkpoint import PPF_PATCHES, make_tokenizer, model_index, write_json, write_tokenizer
from moving_shapes import FRAMES, PHRASINGS, SCENES, SIZE, crop, draw, render
from pyrexport.export.modules import StageTransformer
from pyrexport.runtime.flow import training_pair
from pyrexport.runtime.model import ModelDescription, describe_model
from pyrexport.runtime.pyramid import Resolution
from pyrexport.runtime.resample import downsample, upsample
from pyrexport.runtime.wan import WanConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

CONFIG = WanConfig(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4, text_dim=128, freq_dim=256)
UMT5 = {
    "d_model": 128,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 256,
    "dropout_rate": 0.0,
}
VAE = {"base_dim": 8}
TEXT_LENGTH = 32
KL_WEIGHT = 3e-4
DROP_PROMPT = 0.1
EMA = 0.999


def description(kind: str) -> ModelDescription:
    """The `pyramid.json` of the checkpoint."""
    schedules = {
        name: {"steps": list(map(int, name.split("-"))), "shift": 5.0, "guidance_scale": 1.0}
        for name in ("2-2-1", "10-10-10", "20-10-10")
    }
    document = {
        "format": 1,
        "kind": kind,
        "stages": 3,
        "resolution": asdict(Resolution(FRAMES, SIZE, SIZE)),
        "text_length": TEXT_LENGTH,
        "schedules": schedules,
        "default_schedule": "10-10-10",
        "patch_sizes": PPF_PATCHES[:3] if kind == "ppf" else None,
    }
    return describe_model(document, CONFIG, "the demonstration's pyramid.json")


def random_of(seed: int, purpose: str, step: int) -> np.random.Generator:
    """A generator that depends on the seed, a purpose and a step alone."""
    return np.random.Generator(np.random.Philox([seed, *purpose.encode(), step]))


def clips_of(random: np.random.Generator, count: int, device: str, size: int = SIZE) -> tuple[np.ndarray, torch.Tensor]:
    """Scenes [N] and their clips [N, 3, T, H, W], seen through a window around the shape where `size` is smaller."""
    scenes = random.integers(len(SCENES), size=count)
    geometry = draw(random, scenes)
    if size < SIZE:
        geometry = crop(geometry, random, size)
    return scenes, render(scenes, torch.from_numpy(geometry).to(device), size)


class Loop:
    """A training loop that can be killed: parameters, optimiser and step in one file, saved beside and renamed."""

    def __init__(
        self, file: Path, parameters: Mapping[str, nn.Parameter], steps: int, rate: float, deadline: float
    ) -> None:
        """Start, or go on from the file if it is there."""
        self.file, self.parameters, self.steps, self.deadline = file, parameters, steps, deadline
        fused = next(iter(parameters.values())).is_cuda
        self.optimiser = torch.optim.AdamW(
            parameters.values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )
        warm = max(1, min(300, steps // 10))
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda step: (
                min(1.0, (step + 1) / warm) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1, step / steps))) / 2)
            ),
        )
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self.step = 0
        if file.is_file():
            self._resume(torch.load(file, weights_only=True, map_location=next(iter(parameters.values())).device))

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.steps

    def run(self, loss_of: Callable[[int], torch.Tensor], log: Path, save_every: float = 60.0) -> bool:
        """Take steps until all are taken or time is up; returns whether all are taken."""
        name, saved, window, start = self.file.stem, time.monotonic(), [], time.monotonic()
        first = self.step
        while not self.done and time.monotonic() < self.deadline:
            loss = loss_of(self.step)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimiser.step()
            self.rate.step()
            self.step += 1
            keep = min(EMA, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - keep)
            window.append(loss.detach())
            if self.step % 50 == 0 or self.done:
                mean = torch.stack(window).mean().item()
                window.clear()
                pace = (time.monotonic() - start) / (self.step - first)
                line = {
                    "part": name,
                    "step": self.step,
                    "of": self.steps,
                    "loss": mean,
                    "seconds_per_step": pace,
                }
                print(
                    f"{name} {self.step}/{self.steps} loss {mean:.5f}, {pace:.3f} s a step, {pace * (self.steps - self.step) / 60:.0f} min left",
                    flush=True,
                )
                with log.open("a") as out:
                    out.write(json.dumps(line) + "\n")
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.done

    def save(self) -> None:
        """Write the state beside, then rename."""
        state = {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "rate": {"last_epoch": self.rate.last_epoch},
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def _resume(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name, p in self.parameters.items():
            p.data.copy_(state["parameters"][name])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.rate.last_epoch = state["rate"]["last_epoch"]
        print(f"{self.file.stem}: going on from step {self.step}", flush=True)


def over_whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let `encode_clips` and `decode_clips` run the VAE's layers over all frames at once: diffusers goes chunk by chunk.

    The same numbers, three times faster on CPU: fewer and larger convolutions, and a norm without `vector_norm`.
    """
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = partial(_resample, module)
        elif isinstance(module, WanRMS_norm):
            module.forward = partial(_channel_norm, module)
    return vae


def _resample(self: WanResample, x: torch.Tensor, feat_cache: None = None, feat_idx: Any = None) -> torch.Tensor:
    """Its `forward` over a whole clip, whose first frame passes by the convolution over time."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        later = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
    return torch.cat([x[:, :, :1], self.time_conv(x)], 2) if self.mode == "downsample3d" and x.shape[2] > 1 else x


def _channel_norm(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-24) * self.gamma


def encode_clips(vae: AutoencoderKLWan, video: torch.Tensor) -> DiagonalGaussianDistribution:
    """Clips [N, 3, 1 + 4k, H, W] to the distribution of their latents."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(video)))


def decode_clips(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents to clips, not clamped."""
    return vae.decoder(vae.post_quant_conv(latents))


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Unit gain, almost an image VAE in every frame, and little noise on the latents: with PyTorch's defaults the first
    thousand steps learn nothing but the background.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            causal = module.weight.ndim == 5 and module.weight.shape[2] == 3
            into = module.weight[0, :, 0] if causal else module.weight[0]
            module.weight.normal_(0, into.numel() ** -0.5)
            module.bias.zero_()
            if causal:
                module.weight[:, :, :2] *= 0.1
    vae.decoder.conv_out.weight *= 0.3
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -6


def train_vae(run: Path, device: str, seed: int, steps: int, batch: int, deadline: float) -> AutoencoderKLWan | None:
    """The VAE: single images, then whole clips, both through a window, then clips in full.

    Crops of a few frames leave later frames to drift.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE)
    initialise(vae)
    over_whole_clips(vae.to(device))
    loop = Loop(run / "vae.pt", dict(vae.named_parameters()), steps, 1e-3, deadline)

    def loss_of(step: int) -> torch.Tensor:
        random = random_of(seed, "vae", step)
        images = step < 0.3 * steps
        size = SIZE // 2 if step < 0.985 * steps else SIZE
        _, video = clips_of(random, 4 * batch if images else batch, device, size)
        if images:
            at = int(random.integers(FRAMES))
            video = video[:, :, at : at + 1]
        torch.manual_seed(int(random.integers(2**62)))
        posterior = encode_clips(vae, video)
        error = decode_clips(vae, posterior.sample()) - video
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + (error**2).mean() + KL_WEIGHT * kl

    if not loop.run(loss_of, run / "log.jsonl"):
        return None
    return round_to_half(vae.eval().requires_grad_(False))


def load_vae(folder: Path, device: str) -> AutoencoderKLWan:
    """A VAE that was trained before."""
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    return over_whole_clips(vae.eval().requires_grad_(False)).to(device)


def round_to_half(module: Any) -> Any:
    """The module with its parameters rounded as they are stored."""
    for p in module.parameters():
        p.data = p.data.half().float()
    return module


@torch.no_grad()
def make_pool(
    run: Path, vae: AutoencoderKLWan, device: str, seed: int, count: int, trained: bool
) -> dict[str, torch.Tensor]:
    """Normalised latents of a pool of clips, with their scenes and the statistics, cached in one file.

    A VAE that was trained before brings its own statistics.
    """
    file = run / "pool.safetensors"
    if not file.is_file():
        scenes, latents = [], []
        for start in range(0, count, 8):
            batch_scenes, video = clips_of(random_of(seed, "pool", start), min(8, count - start), device)
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


def stage_latents(model: ModelDescription, x0: np.ndarray, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per stage, finest first: clean latents [N, C, T, H, W] and their low-pass part R↑(R↓(x0))."""
    pyramid, out = model.pyramid, []
    for _ in pyramid.stages:
        coarse, low = [], []
        for group in pyramid.groups:
            part, axes = x0[:, :, group.frames], [axis + 1 for axis in group.axes]
            coarse.append(downsample(part, pyramid.taps, axes) if len(out) + 1 < pyramid.depth else part)
            low.append(upsample(coarse[-1], pyramid.taps, axes) if len(out) + 1 < pyramid.depth else part)
        out.append(
            (
                torch.from_numpy(x0).half().to(device),
                torch.from_numpy(np.concatenate(low, 2)).half().to(device),
            )
        )
        x0 = np.concatenate(coarse, 2)
    return out


def make_stages(model: ModelDescription) -> tuple[list[StageTransformer], dict[str, nn.Parameter]]:
    """A module per stage, and all parameters by their names in the checkpoint."""
    pyramid = model.pyramid
    config = asdict(CONFIG)
    whole = WanTransformer3DModel(**config | {"patch_size": pyramid.patch_sizes[0]})
    if pyramid.kind != "ppf":
        stage = StageTransformer(whole, torch.zeros(CONFIG.width)).requires_grad_(True)
        return [stage] * pyramid.depth, dict(whole.named_parameters()) | {
            "first_frame_embedding": stage.first_frame_embedding
        }
    stages, parameters = [], {}
    for i, patch in enumerate(pyramid.patch_sizes):
        module = whole if i == 0 else WanTransformer3DModel(**config | {"num_layers": 1, "patch_size": patch})
        module.blocks, module.condition_embedder = whole.blocks, whole.condition_embedder
        module.scale_shift_table = whole.scale_shift_table
        stages.append(StageTransformer(module))
        for name, p in module.named_parameters():
            part, _, leaf = name.partition(".")
            parameters[f"{part}.{i}.{leaf}" if part in ("patch_embedding", "proj_out") else name] = p
    return stages, parameters


def tokens_of(tokenizer: Tokenizer, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [scenes · phrasings + 1, text length]; the last prompt is empty."""
    tokenizer.enable_truncation(TEXT_LENGTH)
    tokenizer.enable_padding(length=TEXT_LENGTH, pad_id=0)
    words = [scene.prompt(i) for scene in SCENES for i in range(len(PHRASINGS))] + [""]
    encoded = [tokenizer.encode(text) for text in words]
    return (
        torch.tensor([e.ids for e in encoded], device=device),
        torch.tensor([e.attention_mask for e in encoded], device=device),
    )


def batches(
    stages: list[tuple[torch.Tensor, torch.Tensor]],
    scenes: torch.Tensor,
    batch: int,
    random: np.random.Generator,
    model: ModelDescription,
) -> Iterator[tuple[int, Any, Any, torch.Tensor, torch.Tensor]]:
    """Per stage: index, input, target, natural levels [B] and prompts [B]."""
    device = stages[0][0].device
    for stage, (x0, low) in zip(model.pyramid.stages, stages, strict=True):
        # A coarse stage has an eighth of the tokens, and decides what moves where: it gets more samples.
        count = batch * 4**stage.index
        pick = torch.from_numpy(random.integers(len(x0), size=count)).to(device)
        uniform = torch.from_numpy(random.uniform(0, 1, count)).float().to(device)
        level = stage.clean + uniform * (stage.noisy - stage.clean)
        shaped = level.view(-1, 1, 1, 1, 1)
        noise = torch.randn(count, *stage.latent, device=device)
        clean, low_pass = x0[pick].float(), low[pick].float()
        pairs = [
            training_pair(g, stage, clean[:, :, g.frames], low_pass[:, :, g.frames], noise[:, :, g.frames], shaped)
            for g in model.pyramid.groups
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
    run: Path, model: ModelDescription, pool: dict[str, torch.Tensor], tokenizer: Tokenizer, encoder: UMT5EncoderModel,
    frozen: bool, device: str, seed: int, steps: int, batch: int, deadline: float,
) -> dict[str, dict[str, torch.Tensor]] | None:  # fmt: skip
    """The transformer and, unless it is frozen, the text encoder: averaged weights by component, when all steps are taken."""
    torch.manual_seed(seed)
    modules, named = make_stages(model)
    for module in modules:
        module.to(device).train()
    encoder.to(device)
    parameters = {f"transformer/{name}": p for name, p in named.items()}
    if not frozen:
        parameters |= {f"text_encoder/{name}": p for name, p in encoder.named_parameters()}
    latents = stage_latents(model, pool["latents"].float().numpy(), device)
    scenes = pool["scenes"].to(device)
    ids, mask = tokens_of(tokenizer, device)
    loop = Loop(run / "transformer.pt", parameters, steps, 1e-3, deadline)

    def loss_of(step: int) -> torch.Tensor:
        random = random_of(seed, "transformer", step)
        torch.manual_seed(int(random.integers(2**62)))
        losses = []
        for index, x, target, level, prompt in batches(latents, scenes, batch, random, model):
            unique, where = torch.unique(prompt, return_inverse=True)
            # On CPUs without 16-bit arithmetic, bfloat16 is a hundred times slower than float32.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                text = encoder(ids[unique], mask[unique]).last_hidden_state * mask[unique][..., None]
                velocity = modules[index](x, 1000 * level, text[where]).float()
            losses.append(nn.functional.mse_loss(velocity, target) / target.var().detach())
        return torch.stack(losses).mean()

    if not loop.run(loss_of, run / "log.jsonl"):
        return None
    out: dict[str, dict[str, torch.Tensor]] = {"transformer": {}, "text_encoder": {}}
    for name, tensor in loop.average.items():
        part, _, leaf = name.partition("/")
        out[part][leaf] = tensor
    return out


def write_checkpoint(
    out: Path, model: ModelDescription, parts: Mapping[str, Mapping[str, torch.Tensor]], vae: AutoencoderKLWan,
    pool: Mapping[str, torch.Tensor], tokenizer: Tokenizer, umt5: UMT5Config,
) -> None:  # fmt: skip
    """The checkpoint folder, weights in float16, written beside and renamed."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    def weights(folder: str, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
        (partial / folder).mkdir(parents=True)
        half = {name: tensor.detach().half().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(half, partial / folder / f"{stem}.safetensors", metadata={"format": "pt"})

    weights("transformer", "diffusion_pytorch_model", parts["transformer"])
    weights("text_encoder", "model", parts["text_encoder"])
    weights("vae", "diffusion_pytorch_model", vae.state_dict())
    head = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.39.0",
        "qk_norm": "rms_norm_across_heads",
    }
    write_json(partial / "transformer" / "config.json", head | asdict(CONFIG))
    vae.save_config(partial / "vae")
    config = json.loads((partial / "vae" / "config.json").read_text())
    write_json(
        partial / "vae" / "config.json",
        config | {f"latents_{k}": [float(v) for v in pool[k]] for k in ("mean", "std")},
    )
    write_json(partial / "text_encoder" / "config.json", umt5.to_dict() | {"architectures": ["UMT5EncoderModel"]})
    tokenizer.no_padding()
    tokenizer.no_truncation()
    write_tokenizer(partial / "tokenizer", tokenizer)
    write_json(
        partial / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0},
    )
    write_json(
        partial / "model_index.json",
        model_index(["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]),
    )
    write_json(partial / "pyramid.json", model.to_json())
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--kind", type=click.Choice(["pyramidal", "ppf"]), default="pyramidal", show_default=True)
@click.option(
    "--parts",
    type=click.Path(path_type=Path, exists=True),
    help="Take VAE and text encoder from this checkpoint, frozen.",
)
@click.option(
    "--vae",
    "vae_of",
    type=click.Path(path_type=Path, exists=True),
    help="Take the VAE alone from this folder, and train the rest.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--vae-steps", type=click.IntRange(1), default=5000, show_default=True)
@click.option("--vae-batch", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--pool",
    "pool_size",
    type=click.IntRange(8),
    default=1440,
    show_default=True,
    help="Clips whose latents are cached.",
)
@click.option("--steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Of stage 0; four times as many for each coarser one.",
)
@click.option("--minutes", type=float, default=math.inf, help="Stop, resumable, after this long.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    run: Path, output: Path, kind: str, parts: Path | None, vae_of: Path | None, device: str, vae_steps: int, vae_batch: int, pool_size: int,
    steps: int, batch: int, minutes: float, seed: int,
) -> None:  # fmt: skip
    """Train into RUN (again, to go on), and write the CHECKPOINT when done."""
    deadline = time.monotonic() + 60 * minutes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run.mkdir(parents=True, exist_ok=True)
    model = description(kind)
    given = vae_of or (parts and parts / "vae")
    vae = load_vae(given, device) if given else train_vae(run, device, seed, vae_steps, vae_batch, deadline)
    if vae is None:
        return
    if parts is not None:
        encoder = UMT5EncoderModel.from_pretrained(parts / "text_encoder", torch_dtype=torch.float32).requires_grad_(
            False
        )
        tokenizer = Tokenizer.from_file(str(parts / "tokenizer" / "tokenizer.json"))
    else:
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(UMT5Config(**UMT5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
        tokenizer = make_tokenizer(
            [scene.prompt(i) for scene in SCENES for i in range(len(PHRASINGS))], UMT5["vocab_size"]
        )
    pool = make_pool(run, vae, device, seed, pool_size, trained=given is not None)
    trained = train_transformer(
        run, model, pool, tokenizer, encoder, parts is not None, device, seed, steps, batch, deadline
    )
    if trained is None:
        print("time is up: run again to go on", flush=True)
        return
    if parts is not None:
        trained["text_encoder"] = dict(encoder.named_parameters())
    write_checkpoint(output, model, trained, vae, pool, tokenizer, encoder.config)
    print(f"wrote {output}", flush=True)


if __name__ == "__main__":
    main()
