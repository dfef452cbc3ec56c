"""What to run first on a Snapdragon: each graph of a bundle, timed, and all of them against a trace if one is given.

    python scripts/npu_check.py BUNDLE [--chip sm8750] [--trace FILE] [--runs 5]

A trace is what `pyrexport parity BUNDLE --reference CHECKPOINT --record FILE` writes on the machine with the
checkpoint. On anything but Arm the processor is emulated, and times mean nothing.
"""

import platform
import time
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pyrexport
from pyrexport.runtime.bundle.engines import find_target
from pyrexport.runtime.proof.parity import check_parity
from pyrexport.runtime.proof.trace import Trace
from rich.console import Console
from rich.table import Table


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--chip", default="", help="Of a bundle for several chips, the one that is here.")
@click.option("--trace", type=click.Path(path_type=Path, exists=True))
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
def main(bundle: Path, chip: str, trace: Path | None, runs: int) -> None:
    """Run each graph of BUNDLE."""
    wheels = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-qnn"))
    click.echo(f"{platform.platform()} ({platform.machine()}); {wheels}")
    table, draw = Table("graph", "load s", "first run s", "least s", "finite"), np.random.default_rng(0)
    with pyrexport.load(bundle, **({"chip": chip} if chip else {})) as pipeline:
        manifest = pipeline.bundle.manifest
        click.echo(find_target(manifest.target).remark() or "on the device")
        for key, entry in manifest.graphs.items():
            spec = entry.spec
            inputs = {each.name: draw.random(each.shape, np.float32).astype(each.dtype) for each in spec.inputs}
            times = [time.perf_counter()]
            pipeline.open(key)
            times.append(time.perf_counter())
            for _ in range(runs + 1):
                outputs = pipeline.run(key, inputs)
                times.append(time.perf_counter())
            load, first, *others = np.diff(times)
            finite = all(bool(np.isfinite(value).all()) for value in outputs.values())
            table.add_row(spec.name, *(f"{seconds:.3f}" for seconds in (load, first, min(others))), str(finite))
    Console().print(table)
    if trace is not None:
        with pyrexport.load(bundle, resident=True, **({"chip": chip} if chip else {})) as pipeline:
            for name, level in check_parity(pipeline, Trace(trace))["levels"].items():
                click.echo(f"{name}: {level}")


if __name__ == "__main__":
    main()
