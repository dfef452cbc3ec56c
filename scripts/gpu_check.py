"""TensorRT on the GPU that is here, in one go: build, parity, latency beside PyTorch, device memory.

    python scripts/gpu_check.py BUNDLE|CHECKPOINT [--precision bf16] [--minutes 10] [--json FILE]

A checkpoint is built for this GPU with every library that is here (tensorrt, tensorrt-rtx); a bundle is taken as it is.
Each step is tried by itself, and one that cannot be done is skipped with its reason. PyTorch's times and the stages'
references need the checkpoint (`--reference` beside a bundle) and a PyTorch that sees the GPU.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import pyrexport
from pyrexport.export.bundle.build import build
from pyrexport.export.families import modules_of
from pyrexport.export.weights.names import to_diffusers
from pyrexport.runtime.bundle.graphs import GraphKey, stage_key
from pyrexport.runtime.bundle.opening import is_bundle, open_bundle
from pyrexport.runtime.chain.plan import single_step
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import CheckFailed, UsageError
from pyrexport.runtime.model.checkpoint import Checkpoint, read_checkpoint
from pyrexport.runtime.pipeline.pipeline import Pipeline
from pyrexport.runtime.proof.metrics import distance
from pyrexport.runtime.proof.tolerances import tolerances_of
from pyrexport.targets.trt import library
from pyrexport.targets.trt.cuda import Cuda
from rich.console import Console
from rich.table import Table

LEVEL = 0.7
"""Natural level that stages are evaluated at."""
RUNS = 5
"""Runs that a latency is the least and the median of, after those to warm up."""


class Steps:
    """Steps that were tried: their results, or why they were not done."""

    def __init__(self, minutes: float, file: Path | None, quiet: bool) -> None:
        """Steps that end within some minutes, their results written to a file after each."""
        self.end, self.file, self.quiet = time.monotonic() + 60 * minutes, file, quiet
        self.results: dict[str, Any] = {}

    def attempt(self, name: str, needs: float, step: Callable[[], Any]) -> Any:
        """Do a step that takes about `needs` seconds; None where it cannot be done."""
        if time.monotonic() + needs > self.end:
            self.results[name] = {"skipped": f"about {needs:.0f} s are needed, fewer are left"}
            return None
        start = time.monotonic()
        try:
            found = step()
            self.results[name] = {"seconds": round(time.monotonic() - start, 1), "result": found}
        except Exception as error:  # of a library that was never run here: the other steps still count
            reason = f"{type(error).__name__}: {error}"
            found, self.results[name] = None, {"skipped": " ".join(reason.split())[:300]}
        if self.file is not None:
            self.file.write_text(json.dumps(self.results, indent=1, default=str))
        if not self.quiet:
            state = self.results[name].get("skipped", self.results[name].get("result"))
            click.echo(f"{name}: {state}", err=True)
        return found


def machine() -> dict[str, Any]:
    """The GPU, its driver and memory, and the versions of libraries that are here."""
    versions = {
        name: library.installed_version(name) for name in ("tensorrt", "tensorrt-rtx", "torch", "onnxruntime-gpu")
    }
    cuda = Cuda()
    free, total = memory(cuda)
    driver = cuda.call("cudaDriverGetVersion")
    return {"capability": cuda.capability(), "driver": driver, "memory": total, "free": free, "versions": versions}


def memory(cuda: Cuda) -> tuple[int, int]:
    """Bytes of the device that are free, and all of them."""
    status, free, total = cuda.runtime.cudaMemGetInfo()
    if status.name != "cudaSuccess":
        raise CheckFailed(f"cudaMemGetInfo failed: {status.name}")
    return int(free), int(total)


def unlisted_capability() -> dict[str, Any]:
    """What TensorRT for RTX itself says of this GPU, listed or not: a product of two matrices is built for it."""
    trt: Any = library.import_library("tensorrt-rtx")
    lines: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                lines.append(" ".join(message.split()))

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    a = network.add_input("a", trt.float16, (64, 64))
    none = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(a, none, a, none).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    accepted = config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    plan = builder.build_serialized_network(network, config)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan) if plan is not None else None
    listed = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return {
        "listed": listed,
        "accepted": accepted,
        "built": plan is not None,
        "loads": engine is not None,
        "log": lines[-3:],
    }


def inputs_of(pipeline: Pipeline, key: GraphKey) -> dict[str, Any]:
    """Noise of a graph's shapes."""
    rng = np.random.default_rng(0)
    tensors = pipeline.bundle.manifest.graphs[key].spec.inputs
    return {tensor.name: rng.standard_normal(tensor.shape).astype(tensor.dtype) for tensor in tensors}


def latency(pipeline: Pipeline, key: GraphKey) -> dict[str, float]:
    """Milliseconds of a run, copies of inputs and outputs included."""
    inputs, seconds = inputs_of(pipeline, key), []
    pipeline.run(key, inputs)
    for _ in range(RUNS):
        start = time.perf_counter()
        pipeline.run(key, inputs)
        seconds.append(time.perf_counter() - start)
    return {"least_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}


class Torch:
    """The checkpoint's stages in PyTorch on the GPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load all stages, which share their weights."""
        import torch

        if not torch.cuda.is_available():
            raise UsageError("this PyTorch sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = False
        self.torch: Any = torch
        self.checkpoint, self.resolution = checkpoint, checkpoint.resolution
        self.stages = modules_of(checkpoint.model.family).load_transformer(checkpoint)

    def tensors(self, stage: int, dtype: str) -> list[Any]:
        """Latent, timestep and text of the level that is compared; the same values as the engine's."""
        model = self.checkpoint.model
        rng = np.random.default_rng(0)
        latent = rng.standard_normal((1, *model.stages(self.resolution)[stage].latent))
        text = rng.standard_normal((1, model.text_length, model.transformer.text_dim))
        kind = getattr(self.torch, dtype)
        return [self.torch.tensor(value, device="cuda", dtype=kind) for value in (latent, [1000 * LEVEL], text)]

    def velocity(self, stage: int) -> Any:
        """The stage's velocity in float32."""
        with self.torch.inference_mode():
            out = self.stages[stage].cuda().float()(*self.tensors(stage, "float32"))
        return out.cpu().numpy()

    def latency(self, stage: int, *, compiled: bool) -> dict[str, float]:
        """Milliseconds of a forward in bfloat16, eager or compiled for speed."""
        torch = self.torch
        module = self.stages[stage].cuda().bfloat16()
        function = torch.compile(module, mode="max-autotune") if compiled else module
        tensors, seconds = self.tensors(stage, "bfloat16"), []
        with torch.inference_mode():
            for run in range(RUNS + 2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                function(*tensors)
                torch.cuda.synchronize()
                if run >= 2:
                    seconds.append(time.perf_counter() - start)
        return {"least_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}


def stage_parity(pipeline: Pipeline, torch: Torch, stage: int) -> dict[str, Any]:
    """Relative L2 of a stage's velocity against PyTorch in float32 on the same GPU."""
    manifest = pipeline.bundle.manifest
    latent, _, text = (tensor[0].cpu().numpy() for tensor in torch.tensors(stage, "float32"))
    step = single_step(pipeline.model.pyramid, manifest.stages[stage], LEVEL)
    found = pipeline.velocity(step, latent, {"text": text})
    error = distance(found, torch.velocity(stage)[0]).relative_l2
    tolerance = tolerances_of(manifest)["stages"]
    return {"relative_l2": error, "tolerance": tolerance, "passed": error <= tolerance}


def check_bundle(steps: Steps, name: str, folder: Path, torch: Torch | None) -> None:
    """Everything that can be said of one bundle."""
    cuda = steps.attempt(f"{name}: device", 0, Cuda)
    if cuda is None:
        return
    steps.results.pop(f"{name}: device")
    before = memory(cuda)[0]
    pipeline = steps.attempt(f"{name}: open", 5, lambda: pyrexport.load(folder, resident=True))
    if pipeline is None:
        return
    steps.results.pop(f"{name}: open")
    stages = list(reversed(range(pipeline.model.pyramid.depth)))
    with pipeline:
        for stage in stages:
            key = stage_key(stage)
            steps.attempt(f"{name}: {key.name}", 10, lambda key=key: latency(pipeline, key))
        # The engine allocates for its largest profile when it is loaded, and nothing while it runs.
        steps.results[f"{name}: device memory, all stages open"] = {"result": before - memory(cuda)[0]}
        for stage in stages if torch is not None else []:
            parity = lambda stage=stage: stage_parity(pipeline, torch, stage)  # noqa: E731
            steps.attempt(f"{name}: {stage_key(stage).name} parity", 20, parity)


def schemes_of(checkpoint: Path, precision: str) -> dict[str, str]:
    """The precision of each component that is there; UMT5 leaves fp16's range."""
    present = read_checkpoint(checkpoint, rename=to_diffusers).components
    return {name: "bf16" if (name, precision) == ("text_encoder", "fp16") else precision for name in present}


def build_all(steps: Steps, checkpoint: Path, precision: str, folder: Path) -> dict[str, Path]:
    """A bundle for each library that is here."""
    schemes, bundles = schemes_of(checkpoint, precision), dict[str, Path]()
    installed = {name: library.installed_version(name) for name in library.MODULES}
    for name, version in installed.items():
        if version is None:
            steps.results[f"{name}: build"] = {"skipped": "not installed"}
            continue
        out, alone = folder / name, {name: version}
        build_one = lambda out=out: str(build(checkpoint, out, target="trt", precision=schemes))  # noqa: E731
        with patch.object(library, "installed_version", alone.get):  # where both are here, the target takes the first
            if steps.attempt(f"{name}: build", 60, build_one) is not None:
                bundles[name] = out
    return bundles


def show(results: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title="gpu_check", title_justify="left")
    for column in ("step", "result"):
        table.add_column(column, overflow="fold")
    for name, found in results.items():
        result = found.get("result")
        if isinstance(result, dict):
            result = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
        table.add_row(name, f"skipped: {found['skipped']}" if "skipped" in found else str(result))
    Console(width=None if Console().is_terminal else 140).print(table)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--reference", type=click.Path(path_type=Path, exists=True), help="The checkpoint of a bundle.")
@click.option("--precision", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--minutes", type=float, default=10, show_default=True, help="Steps that would end later are skipped.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results here.")
@click.option("--quiet", is_flag=True, help="Say nothing before the table.")
def main(
    model: Path, reference: Path | None, precision: str, minutes: float, json_file: Path | None, quiet: bool
) -> None:
    """Check MODEL, a bundle or a checkpoint, on this GPU. Exit code 1 if a stage did not run or is out of tolerance."""
    steps = Steps(minutes, json_file, quiet)
    steps.attempt("machine", 0, machine)
    steps.attempt("tensorrt-rtx on this GPU", 5, unlisted_capability)
    with tempfile.TemporaryDirectory() as folder:
        source = reference if is_bundle(model) else model
        resolution = open_bundle(model).manifest.resolution if is_bundle(model) else None
        bundles = {"bundle": model} if is_bundle(model) else build_all(steps, model, precision, Path(folder))
        torch = None
        if source is not None:
            torch = steps.attempt("torch", 30, lambda: open_torch(source, resolution))
            steps.results["torch"].pop("result", None)
        for name, bundle in bundles.items():
            check_bundle(steps, name, bundle, torch)
        if torch is not None:
            for compiled in (False, True):
                kind = "torch.compile max-autotune bf16" if compiled else "torch eager bf16"
                for stage in reversed(range(torch.checkpoint.model.pyramid.depth)):
                    run = lambda stage=stage, compiled=compiled: torch.latency(stage, compiled=compiled)  # noqa: E731
                    steps.attempt(f"{kind}: {stage_key(stage).name}", 120 if compiled else 10, run)
    if json_file is not None:
        json_file.write_text(json.dumps(steps.results, indent=1, default=str))
    show(steps.results)
    own = [
        found for name, found in steps.results.items() if name.partition(": stage")[0] in bundles and ": stage" in name
    ]
    if not own or any("skipped" in found or found["result"].get("passed") is False for found in own):
        raise SystemExit(1)


def open_torch(source: Path, resolution: Resolution | None) -> Torch:
    """The checkpoint at a resolution, its own where none is given."""
    return Torch(read_checkpoint(source, resolution=resolution, rename=to_diffusers))


if __name__ == "__main__":
    main()
