"""A training loop that can be killed, and random numbers that depend on the step alone."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

EMA = 0.999


@dataclass(frozen=True)
class Job:
    """A training: where it keeps what it has done, and how much there is to do."""

    run: Path
    device: str
    seed: int
    steps: int
    batch: int
    deadline: float
    """When to stop, by `time.monotonic`."""
    finest: int
    """The batch of stage 0."""


def random_of(seed: int, purpose: str, step: int) -> np.random.Generator:
    """A generator that depends on the seed, a purpose and a step alone."""
    return np.random.Generator(np.random.Philox([seed, *purpose.encode(), step]))


def claim_run(run: Path, settings: dict[str, Any]) -> None:
    """Make a RUN folder for these settings, or make sure that it was begun with them.

    Raises:
        click.UsageError: it was begun with others, or is somebody else's.
    """
    file = run / "settings.json"
    if file.is_file():
        begun = json.loads(file.read_text("utf-8"))
        odd = next((name for name in {**begun, **settings} if begun.get(name) != settings.get(name)), None)
        if odd is not None:
            raise click.UsageError(
                f"{run} was begun with {odd} {begun.get(odd)}, found {settings.get(odd)}: give that, or another RUN"
            )
        return
    if run.exists() and any(run.iterdir()):
        raise click.UsageError(f"{run} is not empty and no training began in it: choose another RUN")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), "utf-8")


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
        self.losses: list[torch.Tensor] = []
        if file.is_file():
            self._resume(torch.load(file, weights_only=True, map_location=next(iter(parameters.values())).device))

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.steps

    def run(self, loss_of: Callable[[int], torch.Tensor], log: Path, save_every: float = 60.0) -> bool:
        """Take steps until all are taken or time is up; returns whether all are taken."""
        name, saved, start = self.file.stem, time.monotonic(), time.monotonic()
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
            self.losses.append(loss.detach())
            if self.step % 50 == 0 or self.done:
                mean = torch.stack(self.losses).mean().item()
                self.losses.clear()
                pace = (time.monotonic() - start) / (self.step - first)
                line = {"part": name, "step": self.step, "of": self.steps, "loss": mean, "seconds_per_step": pace}
                left = f"{pace * (self.steps - self.step) / 60:.0f} min left"
                print(f"{name} {self.step}/{self.steps} loss {mean:.5f}, {pace:.3f} s a step, {left}", flush=True)
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
            "losses": self.losses,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "rate": {"last_epoch": self.rate.last_epoch},
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def _resume(self, state: dict[str, Any]) -> None:
        self.step, self.losses = state["step"], state["losses"]
        for name, p in self.parameters.items():
            p.data.copy_(state["parameters"][name])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.rate.last_epoch = state["rate"]["last_epoch"]
        print(f"{self.file.stem}: going on from step {self.step}", flush=True)
