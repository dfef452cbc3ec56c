"""Run a graph once, on numbers from 0 to 1, in a process of its own, since it may take that with it.

`python -m pyrexport.targets.trying TARGET FILE < request` prints `{"peak": bytes}`: the peak of anonymous memory of the
process. The request is JSON, `spec` and `facts` of the graph.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bundle.engines import EngineOptions, Facts, find_target
from ..runtime.bundle.graphs import GraphKey, GraphSpec, TensorSpec
from ..runtime.chain.pyramid import Resolution
from ..runtime.errors import CheckFailed, PyrexportError
from ..runtime.proof.memory import MemoryWatch

__all__ = ["try_once"]


def try_once(target: str, file: Path, spec: GraphSpec, facts: Facts, process_bytes: int) -> int:
    """Load and run a graph.

    Args:
        target: the name of its target.
        file: that it is in.
        spec: its inputs and outputs.
        facts: what its target found when it wrote it.
        process_bytes: see `Target.process_bytes`.

    Returns:
        The peak of anonymous memory that it took beyond the process's own, in bytes.

    Raises:
        CheckFailed: it does not load or run, or gives values that are not finite.
    """
    # -P: no module of the folder that the build happens to be called from.
    command = [sys.executable, "-P", "-m", "pyrexport.targets.trying", target, str(file)]
    request = json.dumps({"spec": _spec_document(spec), "facts": dict(facts)}, default=str)
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise CheckFailed(f"{spec.name} was lowered but does not run: {line}"[:400])
    peak: int = json.loads(done.stdout)["peak"]
    return max(0, peak - process_bytes)


def _spec_document(spec: GraphSpec) -> dict[str, Any]:
    tensors = {kind: [vars(tensor) for tensor in getattr(spec, kind)] for kind in ("inputs", "outputs")}
    return {"key": vars(spec.key), **tensors}


def _read_spec(document: dict[str, Any]) -> GraphSpec:
    inputs, outputs = (
        tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in document[kind])
        for kind in ("inputs", "outputs")
    )
    key = document["key"]
    resolution = None if key["resolution"] is None else Resolution.parse(key["resolution"])
    return GraphSpec(GraphKey(**key | {"resolution": resolution}), inputs, outputs)


def _main() -> None:
    target, file = sys.argv[1:]
    request = json.load(sys.stdin)
    spec, generator = _read_spec(request["spec"]), np.random.default_rng(0)
    inputs = {tensor.name: generator.random(tensor.shape, np.float32).astype(tensor.dtype) for tensor in spec.inputs}
    with MemoryWatch() as memory:
        try:
            engine = find_target(target).open_engine(Path(file), spec, request["facts"], EngineOptions())
            outputs = engine.run(inputs)
        except PyrexportError as error:
            raise SystemExit(str(error)) from None
    if not all(np.isfinite(value).all() for value in outputs.values()):
        raise SystemExit("its outputs are not finite: the weights of the checkpoint are damaged")
    print(json.dumps({"peak": memory.anonymous}))


if __name__ == "__main__":
    _main()
