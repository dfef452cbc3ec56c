"""The PyTorch reference as a process that runs a chain for each line that it reads: `pyrexport bench --reference`."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ...runtime.chain.pyramid import Resolution
from ...runtime.chain.sampler import sample
from ...runtime.model.checkpoint import read_checkpoint
from ...runtime.proof.measure import MemoryWatch
from ..families.wan.names import to_diffusers
from .reference import Reference

__all__ = ["main"]


def main(folder: str, threads: str, schedule: str, resolution: str) -> None:
    """Warm up with one chain, then one for each line on standard input; answers are JSON lines."""
    torch.set_num_threads(int(threads))
    checkpoint = read_checkpoint(Path(folder), resolution=Resolution.parse(resolution), rename=to_diffusers)
    reference = Reference(checkpoint)
    shape = (checkpoint.model.text_length, checkpoint.config.text_dim)
    text = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    plan = checkpoint.model.schedule(schedule or None)
    memory = MemoryWatch()
    while True:
        start = time.perf_counter()
        sample(checkpoint.model.pyramid, reference, text, plan, negative_text=text, seed=0)
        print(json.dumps({"chain": time.perf_counter() - start, "peak_rss_bytes": memory.resident}), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
