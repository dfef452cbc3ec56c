"""What is particular to ONNX Runtime."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Option, Table, at_least
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.documents import Fields
from ...runtime.errors import UsageError
from ...runtime.quantisation import FLOAT_SCHEMES, Scheme
from ..facts import BuildTarget
from ..forms import Lowering, OnnxForm
from .providers import CPU, PROVIDERS, Provider, find_provider, provider_of

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Ort"]

ENGINE = "onnxruntime"

KERNELS = {"avx2": 63, "vnni": 127}
"""Largest magnitude of a weight by kernel: AVX2 adds two products of 8 bits in 16, which 2 · 255 · 127 overflows."""

GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class Ort(BuildTarget):
    """One .onnx file per graph, all of them pointing into one weights file that they map."""

    name = "ort"
    suffix = ".onnx"
    schemes = PROVIDERS[CPU].schemes
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
        Option(
            "provider",
            "--provider",
            f"Of ONNX Runtime: what graphs are written for and run by: {', '.join(PROVIDERS)}. Default: {CPU}.",
            metavar="NAME",
        ),
        Option("provider_untested", "--provider-untested", "Take a provider that no test has run.", switch=True),
    )
    engine_options = (
        Option(
            "provider",
            "--provider",
            "Of bundles for the CPU: ONNX Runtime's execution provider, in place of the CPU's.",
            metavar="NAME",
        ),
        Option("prepack", "--prepack", "Let ONNX Runtime copy weights into its own layout.", switch=True),
        Option("device", "--device", "Of bundles for a provider: one of its devices, such as gpu.", metavar="NAME"),
        Option(
            "arithmetic",
            "--arithmetic",
            "OpenVINO: what products are computed in, where the machine has it. Default: fp32.",
            choices=("fp32", "bf16", "fp16"),
        ),
    )

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The kernel that is right everywhere and the CPU, where nothing else is given; a provider has to be here."""
        resolved = super().resolve_options(given)
        provider = find_provider(resolved["provider"] or CPU, untested=resolved["provider_untested"])
        if provider.registration:
            from .session import find_devices

            find_devices(provider, "")
        return resolved | {"kernel": resolved["kernel"] or "avx2", "provider": provider.name}

    def adapted(self, scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
        """Integers within what the kernel's sums hold.

        Raises:
            UsageError: the provider does not take the scheme whole.
        """
        provider = _provider(options)
        if scheme.name not in provider.schemes:
            takes = [name for name in provider.schemes if name not in FLOAT_SCHEMES]
            raise UsageError(
                f"{provider.title} takes matrices in {' or '.join(takes) or 'no integers'}, found {scheme.name}: "
                "build for another provider, or leave out --quantize"
            )
        return replace(scheme, largest=KERNELS[options["kernel"]]) if scheme.activations else scheme

    def engine(self) -> tuple[str, str]:
        """The engine that is installed, and its version."""
        return ENGINE, version(ENGINE)

    def engine_of(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The wheel of the provider, and its version."""
        provider = _provider(options)
        return provider.wheel, provider.installed_version()

    def check_version(self, name: str, version: str) -> None:
        """Refuse what a newer engine wrote, or one of another provider."""
        wheels = {provider.wheel for provider in PROVIDERS.values()}
        at_least(name if name in wheels else ENGINE, (name, version))

    def check_engine_options(self, options: EngineOptions) -> None:
        """Refuse an execution provider that is not there."""
        super().check_engine_options(options)
        if options.own.get("provider"):
            from .session import check_provider

            check_provider(options.own["provider"])

    def check_facts(self, facts: Fields) -> None:
        """Check the provider, and how many nodes it took; graphs for the CPU have no facts."""
        if facts.document:
            facts.text("provider", choices=tuple(PROVIDERS))
            facts.integer("nodes", least=0)
            facts.get("left", "a number of nodes by operator", _are_counts)

    def table(self, facts: Mapping[str, Facts]) -> Table | None:
        """What providers took of each graph."""
        columns = ("graph", "provider", "nodes taken", "left to the CPU")
        rows = tuple(
            (name, found["provider"], str(found["nodes"]), ", ".join(f"{n} {op}" for op, n in found["left"].items()))
            for name, found in facts.items()
        )
        return Table("where nodes run", columns, rows) if rows else None

    def gpus(self, options: EngineOptions) -> int:
        """One, where an execution provider of GPUs is asked for."""
        return int(options.own.get("provider", "") in GPU_PROVIDERS)

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A session of a graph."""
        return _open(file, spec, facts, options)

    def open_model(self, model: bytes, folder: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A session of a graph that is no file, its external data in a folder."""
        return _open(folder / f"{spec.name}.onnx", spec, facts, options, model)

    def dialect(self) -> "Dialect":
        """Building blocks of one operator each."""
        return self.dialect_of({})

    def dialect_of(self, options: Mapping[str, Any]) -> "Dialect":
        """Building blocks that the provider takes as they are."""
        from .dialect import DIALECTS

        return DIALECTS[_provider(options).dialect]

    def write_program(
        self, name: str, forms: Sequence[OnnxForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Write NAME.onnx, of one graph."""
        from .build import write_graph

        return write_graph(name, forms, folder, _provider(options))

    def try_graph(self, file: Path, spec: GraphSpec, facts: Facts) -> int | None:
        """Run a graph by its provider: it may be taken, and still not run."""
        from ..trying import try_once

        return try_once(self.name, file, spec, facts, self.process_bytes)

    def memory_plan(self, options: Mapping[str, Any]) -> Callable[[OnnxForm], int] | None:
        """What a run of ONNX Runtime's own kernels takes, found by following it on paper."""
        if _provider(options).name != CPU:
            return None
        from .memory import peak_bytes

        return lambda form: peak_bytes(form.model)


def _provider(options: Mapping[str, Any]) -> Provider:
    """The provider of a build; bundles from before there were others don't say."""
    return PROVIDERS[options.get("provider") or CPU]


def _open(file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions, model: bytes | None = None) -> Engine:
    provider = provider_of(facts)
    for name, value in options.own.items():
        if value and name not in provider.engine_options:
            raise UsageError(f"{provider.title} has no option '{name}': leave it out")
    if provider.native:
        from .openvino import OpenvinoEngine

        return OpenvinoEngine(file, spec, options, model)
    from .session import OrtEngine

    return OrtEngine(file, spec, provider, options, model)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int and count > 0 for count in value.values())
