"""The PyTorch reference as a process that runs a chain for each line that it reads: `pyrexport bench --reference`."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ...runtime.chain.plan import plan
from ...runtime.chain.pyramid import Resolution
from ...runtime.chain.sampler import sample
from ...runtime.model.checkpoint import read_checkpoint
from ...runtime.proof.memory import MemoryWatch
from ..weights.names import to_diffusers
from .reference import Reference

__all__ = ["main"]


def main(folder: str, threads: str, schedule: str, resolution: str) -> None:
    """Warm up with one chain, then one for each line on standard input; answers are JSON lines."""
    torch.set_num_threads(int(threads))
    checkpoint = read_checkpoint(Path(folder), resolution=Resolution.parse(resolution), rename=to_diffusers)
    reference = Reference(checkpoint)
    model = checkpoint.model
    shape = (model.text_length, model.transformer.text_dim)
    text = {"text": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    steps = plan(model.pyramid, checkpoint.resolution, model.schedule(schedule or None))
    memory = MemoryWatch()
    while True:
        start = time.perf_counter()
        sample(steps, model.pyramid.taps, reference, text, negative=text, seed=0, history=model.family.history)
        print(json.dumps({"chain": time.perf_counter() - start, "peak_rss_bytes": memory.resident}), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
