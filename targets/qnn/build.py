"""Networks to contexts: cut, compiled for each chip with nothing left to the CPU, and run in the emulation."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ...runtime.bundle.engines import EngineOptions, Facts
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import CheckFailed
from ..cutting import cut_network, stored_bytes
from ..digest import network_digest
from ..external import refer
from ..forms import Lowering, OnnxForm
from ..parts import part_name
from .chips import CHIPS
from .compile import CONTEXT
from .names import context_file, head_digest, is_on_cpu, is_shared, network_file, weights_name
from .provider import is_emulated
from .session import QnnEngine

__all__ = ["plan_contexts", "try_contexts", "write_contexts"]

REFERENCE = "ep_cache_context"
"""The attribute of a context's node that names its file."""


@dataclass(frozen=True)
class _Network:
    """A graph's network, and the parts that it is cut into."""

    form: OnnxForm
    parts: tuple[OnnxForm, ...]

    @property
    def spec(self) -> GraphSpec:
        """Of the graph."""
        return self.form.graphs[0]

    @property
    def names(self) -> list[str]:
        """Of the parts."""
        return [part_name(self.spec.name, index) for index in range(len(self.parts))]

    def files(self, chip: str, shared: bool) -> list[str]:
        """What the contexts of the parts lie in."""
        spec = self.spec
        return [weights_name(spec.key.program, spec.name, chip, shared, part) for part in range(len(self.parts))]


def _cut(form: OnnxForm, options: Mapping[str, Any]) -> _Network:
    return _Network(form, tuple(cut_network(form, int(options["context_limit"]), "--context-limit")))


def plan_contexts(forms: Sequence[OnnxForm], options: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of weights and constants of each context that a program will become, by the name of its file.

    Raises:
        UsageError: a network cannot be cut into contexts within their limit.
    """
    if is_on_cpu(forms[0].graphs[0].key.component, options):
        return {}
    shared = is_shared([form.graphs[0] for form in forms], options)
    found = dict[str, int]()
    for network in (_cut(form, options) for form in forms):
        nbytes = list(map(stored_bytes, network.parts))
        for chip in options["soc"]:
            for name, size in zip(network.files(chip, shared), nbytes, strict=True):
                found[name] = max(size, found.get(name, 0))  # once for all that share it
    return found


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
        UsageError: a network cannot be cut into contexts within their limit.
    """
    if is_on_cpu(forms[0].graphs[0].key.component, options):
        for form in forms:
            _save(form, folder / network_file(form.graphs[0].name))
            yield Lowering(facts=_facts(form, options, False, {}))
        return
    networks, contexts = [_cut(form, options) for form in forms], folder / f"{program}.contexts"
    shared = is_shared([network.spec for network in networks], options)
    shutil.rmtree(contexts, ignore_errors=True)
    contexts.mkdir()
    for network in networks:
        for name, part in zip(network.names, network.parts, strict=True):
            _save(part, folder / network_file(name))
    for chip in options["soc"]:
        _compile(folder, contexts, _batches(networks, shared), chip, options["finalisation"], shared)
        for network in networks:
            _take(contexts, folder, network, chip, shared)
    shutil.rmtree(contexts)
    for network in networks:
        for name in network.names:
            (folder / network_file(name)).unlink()
        yield _lowering(network, folder, options, shared)


def _lowering(network: _Network, folder: Path, options: Mapping[str, Any], shared: bool) -> Lowering:
    """What became of a network."""
    files = {chip: network.files(chip, shared) for chip in options["soc"]}
    heads = {chip: [head_digest(folder / name) for name in names] for chip, names in files.items()}
    count = len(network.parts)
    contexts = "one context" if count == 1 else f"{count} contexts, one after the other,"
    return Lowering(
        f"{network.spec.name}: {contexts} for {', '.join(options['soc'])}, nothing on the CPU",
        _facts(network.form, options, shared, heads),
        files=tuple(name for names in files.values() for name in names),
    )


def _facts(form: OnnxForm, options: Mapping[str, Any], shared: bool, heads: Mapping[str, list[str]]) -> dict[str, Any]:
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


def _batches(networks: Sequence[_Network], shared: bool) -> list[list[str]]:
    """Names of what is compiled together: where weights are shared, the parts of all graphs that are alike."""
    names = [network.names for network in networks]
    if not shared:
        return [[name] for each in names for name in each]
    return [[name for name in alike if name] for alike in zip_longest(*names)]


def _compile(
    folder: Path, contexts: Path, batches: Sequence[Sequence[str]], chip: str, finalisation: str, shared: bool
) -> None:
    """Compile networks for a chip, each batch in a process of its own."""
    request: dict[str, Any] = {"folder": str(folder), "contexts": str(contexts), "chip": chip}
    request |= {"finalisation": finalisation, "shared": shared}
    for batch in batches:
        # -P: no module of the folder that the build happens to be called from.
        command = [sys.executable, "-P", "-m", "pyrexport.targets.qnn.compile"]
        text = json.dumps(request | {"networks": list(batch)})
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"the compiler ended with code {done.returncode}"])[-1]
            if done.returncode < 0:
                line = f"the compiler was ended by signal {-done.returncode}, for lack of memory perhaps"
            sold = CHIPS[chip].sold_as
            raise CheckFailed(f"{', '.join(batch)} cannot be compiled for {chip} ({sold}): {line}"[:400])


def _take(contexts: Path, folder: Path, network: _Network, chip: str, shared: bool) -> None:
    """Move a network's contexts to their places in the bundle, and write the graph that runs them in turn."""
    models, spec = [], network.spec
    for name, weights in zip(network.names, network.files(chip, shared), strict=True):
        compiled = contexts / f"{name}{CONTEXT}"
        model = onnx.load(compiled)
        (node,) = (node for node in model.graph.node if node.op_type == "EPContext")
        (refers,) = (attribute for attribute in node.attribute if attribute.name == REFERENCE)
        source = contexts / refers.s.decode()
        if source.exists():  # of several that share it, the first one moves it
            source.replace(folder / weights)
        refers.s = weights.encode()
        models.append(model)
        compiled.unlink()
    onnx.save(_joined(models, spec), folder / context_file(spec.name, chip))


def _joined(models: Sequence[onnx.ModelProto], spec: GraphSpec) -> onnx.ModelProto:
    """The graph of several, each of which takes by name what those before it give."""
    whole, graphs = models[0], [model.graph for model in models]
    values = {value.name: value for graph in graphs for value in (*graph.input, *graph.output)}
    inputs = [values.pop(tensor.name) for tensor in spec.inputs if tensor.name in values]
    outputs = [values.pop(tensor.name) for tensor in spec.outputs if tensor.name in values]
    graph = onnx.helper.make_graph(
        [node for graph in graphs for node in graph.node],
        whole.graph.name,
        inputs,
        outputs,
        [tensor for graph in graphs for tensor in graph.initializer],
        value_info=list(values.values()),
    )
    whole.graph.CopyFrom(graph)
    return whole


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
