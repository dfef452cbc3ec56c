"""Networks to contexts: compiled for each chip with nothing left to the CPU, and run in the emulation."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.bundle.engines import EngineOptions, Facts
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import CheckFailed
from ..digest import network_digest
from ..external import refer
from ..forms import Lowering, OnnxForm
from .chips import CHIPS
from .compile import CONTEXT
from .names import context_file, is_on_cpu, is_shared, network_file, weights_name
from .provider import is_emulated
from .session import QnnEngine

__all__ = ["try_contexts", "write_contexts"]

REFERENCE = "ep_cache_context"
"""The attribute of a context's node that names its file."""


def write_contexts(
    program: str, forms: Sequence[OnnxForm], folder: Path, options: Mapping[str, Any]
) -> Iterator[Lowering]:
    """Write the files of a program.

    Args:
        program: its name.
        forms: a network for each of its graphs.
        folder: the bundle's folder.
        options: the target's own.

    Yields:
        For each graph what it was compiled for.

    Raises:
        CheckFailed: the compiler refuses a network, or would leave a part of it to the CPU.
    """
    if is_on_cpu(forms[0].graphs[0].key.component, options):
        for form in forms:
            _save(form, folder / network_file(form.graphs[0].name))
            yield Lowering(facts={"chips": [], "shared": False, "network": network_digest(form)})
        return
    specs = [form.graphs[0] for form in forms]
    shared, seconds = is_shared(specs, options), dict[str, float]()
    networks = folder / f"{program}.networks"
    shutil.rmtree(networks, ignore_errors=True)
    networks.mkdir()
    for form in forms:
        (networks / form.weights.name).unlink(missing_ok=True)
        (networks / form.weights.name).hardlink_to(form.weights)
        _save(form, networks / network_file(form.graphs[0].name))
    for chip in options["soc"]:
        start = time.perf_counter()
        _compile(networks, [spec.name for spec in specs], chip, options["finalisation"], shared)
        for spec in specs:
            _take(networks, folder, spec.name, chip, weights_name(program, spec.name, chip, shared))
        seconds[chip] = time.perf_counter() - start
    shutil.rmtree(networks)
    for form, spec in zip(forms, specs, strict=True):
        facts = {"chips": list(options["soc"]), "shared": shared, "network": network_digest(form)}
        yield Lowering(f"{spec.name}: one context for {', '.join(options['soc'])}, nothing on the CPU", facts)


def _save(form: OnnxForm, file: Path) -> None:
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, file)


def _compile(folder: Path, names: Sequence[str], chip: str, finalisation: str, shared: bool) -> None:
    """Compile networks for a chip, in a process of its own."""
    request = {"folder": str(folder), "chip": chip, "finalisation": finalisation, "shared": shared}
    for batch in [list(names)] if shared else [[name] for name in names]:
        # -P: no module of the folder that the build happens to be called from.
        command = [sys.executable, "-P", "-m", "pyrexport.targets.qnn.compile"]
        text = json.dumps(request | {"networks": batch})
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"the compiler ended with code {done.returncode}"])[-1]
            sold = CHIPS[chip].sold_as
            raise CheckFailed(f"{', '.join(batch)} cannot be compiled for {chip} ({sold}): {line}"[:400])


def _take(networks: Path, folder: Path, name: str, chip: str, weights: str) -> None:
    """Move a context to its place in the bundle, under a name of its own."""
    compiled = networks / f"{name}{CONTEXT}"
    model = ir.load(compiled)
    (node,) = (node for node in model.graph if node.op_type == "EPContext")
    source = networks / node.attributes[REFERENCE].as_string()
    if source.exists():  # of several that share it, the first one moves it
        source.replace(folder / weights)
    node.attributes[REFERENCE] = ir.AttrString(REFERENCE, weights)
    ir.save(model, folder / context_file(name, chip))
    compiled.unlink()


def try_contexts(folder: Path, spec: GraphSpec, facts: Facts) -> int | None:
    """Run each context of a graph once, on numbers from 0 to 1; those that share weights are opened by chips alone.

    Raises:
        CheckFailed: one does not load or run, or gives values that are not finite.
    """
    if facts["shared"] and is_emulated():
        return None
    generator = np.random.default_rng(0)
    inputs = {tensor.name: generator.random(tensor.shape, np.float32).astype(tensor.dtype) for tensor in spec.inputs}
    for chip in facts["chips"] or [""]:
        file = folder / (context_file(spec.name, chip) if chip else network_file(spec.name))
        engine = QnnEngine(file, spec, facts, EngineOptions(own={"chip": chip}))
        outputs = engine.run(inputs)
        engine.close()
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise CheckFailed(f"{spec.name} on {chip}: '{name}' is not finite; its values leave the range of fp16")
    return None
