"""Networks to contexts: compiled for each chip with nothing left to the CPU, and run in the emulation."""

import json
import shutil
import subprocess
import sys
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
from .names import context_file, head_digest, is_on_cpu, is_shared, network_file, weights_name
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
            yield Lowering(facts=_facts(form, options, False, {}))
        return
    specs = [form.graphs[0] for form in forms]
    names, shared = [spec.name for spec in specs], is_shared(specs, options)
    contexts = folder / f"{program}.contexts"
    shutil.rmtree(contexts, ignore_errors=True)
    contexts.mkdir()
    for form, name in zip(forms, names, strict=True):
        _save(form, folder / network_file(name))
    heads: dict[str, dict[str, str]] = {name: {} for name in names}
    for chip in options["soc"]:
        _compile(folder, contexts, names, chip, options["finalisation"], shared)
        for name in names:
            weights = weights_name(program, name, chip, shared)
            _take(contexts, folder, name, chip, weights)
            heads[name][chip] = head_digest(folder / weights)
    shutil.rmtree(contexts)
    for form, name in zip(forms, names, strict=True):
        (folder / network_file(name)).unlink()
        facts = _facts(form, options, shared, heads[name])
        yield Lowering(f"{name}: one context for {', '.join(options['soc'])}, nothing on the CPU", facts)


def _facts(form: OnnxForm, options: Mapping[str, Any], shared: bool, heads: Mapping[str, str]) -> dict[str, Any]:
    return {
        "chips": list(heads),
        "heads": dict(heads),
        "shared": shared,
        "finalisation": options["finalisation"],
        "network": network_digest(form),
    }


def _save(form: OnnxForm, file: Path) -> None:
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, file)


def _compile(folder: Path, contexts: Path, names: Sequence[str], chip: str, finalisation: str, shared: bool) -> None:
    """Compile networks for a chip, in a process of its own."""
    request: dict[str, Any] = {"folder": str(folder), "contexts": str(contexts), "chip": chip}
    request |= {"finalisation": finalisation, "shared": shared}
    for batch in [list(names)] if shared else [[name] for name in names]:
        # -P: no module of the folder that the build happens to be called from.
        command = [sys.executable, "-P", "-m", "pyrexport.targets.qnn.compile"]
        text = json.dumps(request | {"networks": batch})
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"the compiler ended with code {done.returncode}"])[-1]
            if done.returncode < 0:
                line = f"the compiler was ended by signal {-done.returncode}, for lack of memory perhaps"
            sold = CHIPS[chip].sold_as
            raise CheckFailed(f"{', '.join(batch)} cannot be compiled for {chip} ({sold}): {line}"[:400])


def _take(contexts: Path, folder: Path, name: str, chip: str, weights: str) -> None:
    """Move a context to its place in the bundle, under a name of its own."""
    compiled = contexts / f"{name}{CONTEXT}"
    model = ir.load(compiled)
    (node,) = (node for node in model.graph if node.op_type == "EPContext")
    source = contexts / node.attributes[REFERENCE].as_string()
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
