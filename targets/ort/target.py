"""What is particular to ONNX Runtime."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Option, at_least
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.quantisation import FLOAT_SCHEMES, Scheme
from ..facts import BuildTarget
from ..forms import Lowering, OnnxForm

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Ort"]

ENGINE = "onnxruntime"

KERNELS = {"avx2": 63, "vnni": 127}
"""Largest magnitude of a weight by kernel: AVX2 adds two products of 8 bits in 16, which 2 · 255 · 127 overflows."""


class Ort(BuildTarget):
    """One .onnx file per graph, all of them pointing into one weights file that they map."""

    name = "ort"
    suffix = ".onnx"
    schemes = (*FLOAT_SCHEMES, "w8", "w4", "w8a8-dynamic", "w8a8")
    cache_schemes = ("fp32", "fp16")
    process_bytes = 40 * 2**20  # measured with ONNX Runtime 1.31
    build_options = (
        Option(
            "kernel",
            "--kernel",
            "Of integer products: avx2 keeps weights within 7 bits, so that no sum overflows on a CPU without VNNI; "
            "vnni uses all 8. Default: avx2, right everywhere.",
            choices=tuple(KERNELS),
        ),
    )
    engine_options = (
        Option("provider", "--provider", "ONNX Runtime's execution provider, in place of the CPU's.", metavar="NAME"),
        Option("prepack", "--prepack", "Let ONNX Runtime copy weights into its own layout.", switch=True),
    )

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The kernel that is right everywhere, where none is given."""
        resolved = super().resolve_options(given)
        return resolved | {"kernel": resolved["kernel"] or "avx2"}

    def adapted(self, scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
        """Integers within what the kernel's sums hold."""
        return replace(scheme, largest=KERNELS[options["kernel"]]) if scheme.activations else scheme

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

    def memory_plan(self) -> Callable[[OnnxForm], int]:
        """What a run takes, found by following it on paper."""
        from .memory import peak_bytes

        return lambda form: peak_bytes(form.model)
