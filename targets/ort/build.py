"""An ONNX graph to a file of a bundle: the weights become references into the weights file."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.bundle.engines import EngineOptions
from ..external import refer
from ..forms import Lowering, OnnxForm
from .memory import peak_bytes
from .providers import CPU, Provider, said_of

__all__ = ["write_graph"]


def write_graph(name: str, forms: Sequence[OnnxForm], folder: Path, provider: Provider) -> Iterator[Lowering]:
    """Write `NAME.onnx`; every weight becomes external data of the bundle's weights file.

    Yields:
        What ONNX Runtime's own kernels will need in memory, or how much of the graph another provider takes.
    """
    (form,) = forms
    file = folder / f"{name}.onnx"
    memory = peak_bytes(form.model) if provider.name == CPU else None
    refer(form.model, form.placements, form.weights)
    ir.save(form.model, file)
    if provider.name == CPU:
        yield Lowering(memory=memory)
        return
    facts = _taken(file, form, provider)
    yield Lowering(f"{form.name}: {said_of(facts)}", facts)


def _taken(file: Path, form: OnnxForm, provider: Provider) -> dict[str, Any]:
    """How many nodes a provider takes, and how many of each operator it leaves to the CPU."""
    if provider.native:
        from .openvino import require_whole

        require_whole(file)
        return {"provider": provider.name, "nodes": len(form.model.graph), "left": {}}
    from .session import OrtEngine

    engine = OrtEngine(file, form.graphs[0], provider, EngineOptions())
    nodes = engine.nodes()
    engine.close()
    taken = nodes.pop(provider.registration, Counter[str]())
    left = sum(nodes.values(), Counter[str]())
    return {"provider": provider.name, "nodes": taken.total(), "left": dict(left.most_common())}
