"""Distillation: few steps without guidance that end where many guided steps of a teacher end.

Trajectories of the teacher are drawn in rounds. The first round of a stage starts where the teacher's own coarser
stage ends; later ones half where the student's does, so that each stage learns from what it will be given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flow import advance
from pyrexport.runtime.chain.pyramid import Stage
from pyrexport.runtime.chain.resample import upsample_and_renoise
from pyrexport.runtime.chain.schedules import Schedule
from pyrexport.runtime.model.description import Model
from safetensors.torch import load_file, save_file
from shapes_checkpoint import RESOLUTION
from torch import nn
from training_loop import Job, Loop, random_of

ROUNDS = 3

CHUNK = 48
"""Samples of stage 0 that are evaluated at once; four times as many of each coarser one."""

Velocity = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
"""Of latents [N, C, T, H, W] at a natural level, for prompts [N]."""


@dataclass(frozen=True)
class Prompts:
    """Embeddings [prompts, text length, width] of all prompts; the last one is the negative prompt's."""

    embedded: torch.Tensor

    def velocity(self, module: nn.Module, guidance_scale: float = 1.0) -> Velocity:
        """What a stage says, guided or not."""

        def evaluate(x: torch.Tensor, level: float, prompts: torch.Tensor) -> torch.Tensor:
            timestep = torch.full((len(x),), 1000 * level, device=x.device)
            velocity: torch.Tensor = module(x, timestep, self.embedded[prompts])
            if guidance_scale == 1:
                return velocity
            unconditional = module(x, timestep, self.embedded[-1:].expand(len(x), -1, -1))
            return torch.lerp(unconditional, velocity, guidance_scale)

        return evaluate


@torch.no_grad()
def solve(stage: Stage, levels: Sequence[float], velocity: Velocity, x: torch.Tensor, prompts: torch.Tensor) -> Any:
    """Euler's steps through a stage: the latents [N, C, T, H, W] at each of the following levels, and at its end."""
    count, parts = CHUNK * 4**stage.index, []
    for part, words in zip(x.split(count), prompts.split(count), strict=True):
        states = []
        for level, after in zip(levels, (*levels[1:], stage.clean), strict=True):
            part = advance(stage, part, velocity(part, level, words), level, after)
            states.append(part)
        parts.append(states)
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def renoise(model: Model, stage: Stage, x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Where the next finer stage starts from, of latents [N, C, T, H, W]."""
    groups = [
        upsample_and_renoise(
            x[:, :, group.frames].numpy(),
            group.global_level(stage.index, stage.clean),
            model.pyramid.taps,
            [axis + 1 for axis in group.axes],
            random,
        )
        if group.axes
        else x[:, :, group.frames].numpy()
        for group in stage.groups
    ]
    return torch.from_numpy(np.concatenate(groups, 2).astype(np.float32))


@dataclass(frozen=True)
class Distillation:
    """A student's and its teacher's stages, and the schedules that they follow."""

    model: Model
    teacher: Sequence[nn.Module]
    student: Sequence[nn.Module]
    prompts: Prompts
    of_teacher: Schedule
    of_student: Schedule

    def levels(self, schedule: Schedule, stage: Stage) -> tuple[float, ...]:
        """A schedule's levels of a stage."""
        return schedule.levels[self.model.pyramid.depth - 1 - stage.index]

    def draw(self, job: Job, number: int, size: int) -> dict[str, torch.Tensor]:
        """Trajectories of a round: per stage `start.I` [N, C, T, H, W], `prompts.I` [N], and the teacher's latents
        at the levels that the student will pass, `after.I.0` and on; cached in one file.
        """
        file = job.run / f"trajectories-{number}.safetensors"
        if file.is_file():
            return load_file(file, job.device)
        random, out = random_of(job.seed, "trajectories", number), dict[str, torch.Tensor]()
        stages = self.model.stages(RESOLUTION)
        count = size * 4 ** (len(stages) - 1)
        x = torch.from_numpy(random.standard_normal((count, *stages[-1].latent), dtype=np.float32))
        prompts = torch.from_numpy(random.integers(len(self.prompts.embedded) - 1, size=count))
        for stage in reversed(stages):
            levels, passed = self.levels(self.of_teacher, stage), self.levels(self.of_student, stage)
            guided = self.prompts.velocity(self.teacher[stage.index], self.of_teacher.guidance_scale)
            x, prompts = x.to(job.device), prompts.to(job.device)
            states = solve(stage, levels, guided, x, prompts)
            out |= {f"start.{stage.index}": x, f"prompts.{stage.index}": prompts}
            for j, level in enumerate((*passed[1:], stage.clean)):
                at = int(np.argmin(np.abs(np.array((*levels[1:], stage.clean)) - level)))
                out[f"after.{stage.index}.{j}"] = states[at]
            if stage.index == 0:
                break
            keep = size * 4 ** (stage.index - 1)
            ends = states[-1][:keep]
            if number:
                own = self.prompts.velocity(self.student[stage.index])
                half = (keep + 1) // 2
                ends = torch.cat([solve(stage, passed, own, x[:half], prompts[:half])[-1], ends[half:]])
            x, prompts = renoise(self.model, stage, ends.cpu(), random), prompts[:keep]
            print(f"trajectories {number}, stage {stage.index} done", flush=True)
        save_file({name: t.clone() for name, t in out.items()}, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
        return out

    def loss(self, drawn: dict[str, torch.Tensor], batch: int, random: np.random.Generator) -> torch.Tensor:
        """How far each step that the student takes from where it is leads past the teacher's latent."""
        losses = []
        for stage in self.model.stages(RESOLUTION):
            starts = drawn[f"start.{stage.index}"]
            pick = torch.from_numpy(random.integers(len(starts), size=batch * 4**stage.index)).to(starts.device)
            x, prompts = starts[pick], drawn[f"prompts.{stage.index}"][pick]
            levels, own = self.levels(self.of_student, stage), self.prompts.velocity(self.student[stage.index])
            for j, (level, after) in enumerate(zip(levels, (*levels[1:], stage.clean), strict=True)):
                target = drawn[f"after.{stage.index}.{j}"][pick]
                velocity = own(x, level, prompts)
                ideal = advance(stage, torch.zeros_like(x), torch.ones_like(x), level, after)
                wanted = (target - x) / ideal
                losses.append(nn.functional.mse_loss(velocity, wanted) / wanted.var().detach())
                x = advance(stage, x, velocity.detach(), level, after)
        return torch.stack(losses).mean()


def distil(job: Job, distillation: Distillation, parameters: dict[str, nn.Parameter], size: int) -> Any:
    """The student's averaged weights by name, when all steps are taken."""
    loop = Loop(job.run / "student.pt", parameters, job.steps, 3e-4, job.deadline)
    drawn: dict[int, dict[str, torch.Tensor]] = {}

    def loss_of(step: int) -> torch.Tensor:
        number = step * ROUNDS // job.steps
        if number not in drawn:
            loop.save()  # so that a run which is killed meanwhile draws with the same student
            drawn.clear()
            drawn[number] = distillation.draw(job, number, size)
        return distillation.loss(drawn[number], job.batch, random_of(job.seed, "student", step))

    return loop.average if loop.run(loss_of, job.run / "log.jsonl") else None
