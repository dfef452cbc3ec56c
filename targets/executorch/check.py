"""Run a method of a program once, on numbers from 0 to 1: `python -m pyrexport.targets.executorch.check FILE METHOD < specs.json`.

Prints `{"memory": bytes}`: the peak of anonymous memory beyond the process's own.
"""

import json
import sys
from pathlib import Path

import numpy as np

from ...runtime.bundle.engines import EngineOptions
from ...runtime.errors import PyrexportError
from ...runtime.proof.measure import PROCESS_BYTES, MemoryWatch
from .session import ExecutorchEngine


def main() -> None:
    """Load and run."""
    file, method = sys.argv[1:]
    specs = json.load(sys.stdin)
    generator = np.random.default_rng(0)
    inputs = {
        name: generator.random(spec["shape"], np.float32).astype(spec["dtype"])
        for name, spec in specs["inputs"].items()
    }
    with MemoryWatch() as memory:
        try:
            engine = ExecutorchEngine(Path(file), method, specs, EngineOptions())
            outputs = engine.run(inputs)
        except PyrexportError as error:
            raise SystemExit(str(error)) from None
    if not all(np.isfinite(value).all() for value in outputs.values()):
        raise SystemExit("its outputs are not finite: the weights of the checkpoint are damaged")
    print(json.dumps({"memory": max(0, memory.anonymous - PROCESS_BYTES)}))


if __name__ == "__main__":
    main()
