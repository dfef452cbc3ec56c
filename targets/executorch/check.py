"""Run a method of a program once, on numbers from 0 to 1: `python -m pyrexport.targets.executorch.check FILE < spec`.

Prints `{"peak": bytes}`: the peak of anonymous memory of the process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.bundle.engines import EngineOptions
from ...runtime.bundle.graphs import GraphKey, GraphSpec, TensorSpec
from ...runtime.chain.pyramid import Resolution
from ...runtime.errors import PyrexportError
from ...runtime.proof.memory import MemoryWatch
from .session import ExecutorchEngine

__all__ = ["main", "write_spec"]


def write_spec(spec: GraphSpec) -> str:
    """A graph's specification as the process reads it."""
    tensors = {kind: [vars(tensor) for tensor in getattr(spec, kind)] for kind in ("inputs", "outputs")}
    return json.dumps({"key": vars(spec.key), **tensors}, default=str)


def _read_spec(document: dict[str, Any]) -> GraphSpec:
    inputs, outputs = (
        tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in document[kind])
        for kind in ("inputs", "outputs")
    )
    key = document["key"]
    resolution = None if key["resolution"] is None else Resolution.parse(key["resolution"])
    return GraphSpec(GraphKey(**key | {"resolution": resolution}), inputs, outputs)


def main() -> None:
    """Load and run."""
    (file,) = sys.argv[1:]
    spec = _read_spec(json.load(sys.stdin))
    generator = np.random.default_rng(0)
    inputs = {tensor.name: generator.random(tensor.shape, np.float32).astype(tensor.dtype) for tensor in spec.inputs}
    with MemoryWatch() as memory:
        try:
            engine = ExecutorchEngine(Path(file), spec, EngineOptions())
            outputs = engine.run(inputs)
        except PyrexportError as error:
            raise SystemExit(str(error)) from None
    if not all(np.isfinite(value).all() for value in outputs.values()):
        raise SystemExit("its outputs are not finite: the weights of the checkpoint are damaged")
    print(json.dumps({"peak": memory.anonymous}))


if __name__ == "__main__":
    main()
