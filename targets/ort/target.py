"""What is particular to ONNX Runtime."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Option, at_least
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.quantisation import SCHEMES
from ..facts import BuildTarget
from ..forms import Lowering, OnnxForm

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Ort"]

ENGINE = "onnxruntime"


class Ort(BuildTarget):
    """One .onnx file per graph, all of them pointing into one weights file that they map."""

    name = "ort"
    suffix = ".onnx"
    schemes = tuple(SCHEMES)
    cache_schemes = ("fp32", "fp16")
    plans_memory = True
    process_bytes = 40 * 2**20  # measured with ONNX Runtime 1.31
    engine_options = (
        Option("provider", "--provider", "ONNX Runtime's execution provider, in place of the CPU's.", metavar="NAME"),
        Option("prepack", "--prepack", "Let ONNX Runtime copy weights into its own layout.", switch=True),
    )

    def engine(self) -> tuple[str, str]:
        """The engine that is installed, and its version."""
        return ENGINE, version(ENGINE)

    def check_version(self, name: str, version: str) -> None:
        """Refuse what a newer engine wrote."""
        at_least(ENGINE, (name, version))

    def check_engine_options(self, options: EngineOptions) -> None:
        """Refuse an execution provider that is not there."""
        super().check_engine_options(options)
        from .session import check_provider

        check_provider(options.own.get("provider", ""))

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A session of a graph."""
        from .session import OrtEngine

        return OrtEngine(file, spec, options)

    def open_model(self, model: bytes, folder: Path, spec: GraphSpec, options: EngineOptions) -> Engine:
        """A session of a graph that is no file, its external data in a folder."""
        from .session import OrtEngine

        return OrtEngine(folder / f"{spec.name}.onnx", spec, options, model)

    def dialect(self) -> "Dialect":
        """Building blocks of one operator each."""
        from .dialect import FUSED

        return FUSED

    def write_program(
        self, name: str, forms: Sequence[OnnxForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Write NAME.onnx, of one graph."""
        from .build import write_graph

        return write_graph(name, forms, folder)

    def plan_memory(self, form: OnnxForm) -> int:
        """What a run takes, found by following it on paper."""
        from .memory import peak_bytes

        return peak_bytes(form.model)
