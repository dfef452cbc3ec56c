"""What the stages of a bundle cost in memory: PSS of stage 0 alone, and of all stages, loaded and after a forward.

    python scripts/bench_memory.py BUNDLE

Each case runs in a process of its own, and without torch. PSS counts mapped weights that are shared once.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyrexport.runtime.bundle.opening import is_bundle, open_bundle

CHILD = """
import json, sys
import numpy as np
import pyrexport
from pyrexport.runtime.bundle.graphs import stage_key
from pyrexport.runtime.chain.plan import single_step
with pyrexport.load(sys.argv[1], resident=True, threads=2) as pipeline:
    model, manifest = pipeline.model, pipeline.bundle.manifest
    conditions = {"text": np.zeros((model.text_length, model.transformer.text_dim), np.float32)}
    stages = manifest.stages[: int(sys.argv[2])]
    def memory():
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if line.endswith("kB")}
        return {"pss": fields["Pss"], "anonymous": fields["Anonymous"]}
    for stage in stages:
        pipeline.open(stage_key(stage.index))
    loaded = memory()
    for stage in stages:
        step = single_step(model.pyramid, stage, level=0.5)
        pipeline.velocity(step, np.zeros(stage.latent, np.float32), conditions)
    print(json.dumps({**memory(), "loaded": loaded, "torch": "torch" in sys.modules,
                      "weights": manifest.weight_bytes, "stages": model.pyramid.depth}))
"""


def measure(bundle: str, stages: int) -> dict[str, Any]:
    """Memory of a fresh process with the first stages open."""
    command = [sys.executable, "-c", CHILD, bundle, str(stages)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert not found["torch"]
    return found


def main(bundle: str) -> None:
    """Print both cases and their ratio."""
    one = measure(bundle, 1)
    every = measure(bundle, one["stages"])
    files = open_bundle(Path(bundle)).manifest.files
    file = sum(entry.nbytes for name, entry in files.items() if name.endswith((".bin", ".pte")))
    print(f"{platform.platform()}, Python {platform.python_version()}")
    print(f"weights {one['weights']:,} bytes, files that hold them {file:,} bytes, ratio {file / one['weights']:.5f}")
    for name, found in (("stage 0 alone", one), (f"all {one['stages']} stages", every)):
        for when, memory in (("loaded", found["loaded"]), ("after a forward", found)):
            pss, anonymous = memory["pss"] / 2**20, memory["anonymous"] / 2**20
            share = f"{memory['anonymous'] / found['weights']:.3f} of the weights"
            print(f"{name:14} {when:16} PSS {pss:8.1f} MiB, anonymous {anonymous:8.1f} MiB = {share}")
    print(f"ratio of PSS {every['pss'] / one['pss']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not is_bundle(Path(sys.argv[1])):
        sys.exit("expected a BUNDLE's folder")
    main(sys.argv[1])
