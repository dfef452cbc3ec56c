"""What is particular to TensorRT."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Option, Table, check_own
from ...runtime.bundle.entries import is_digest
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.documents import Fields
from ...runtime.errors import UsageError
from ...runtime.quantisation import DECODERS, FLOAT_SCHEMES, Scheme
from ..facts import BuildTarget
from ..forms import Lowering, OnnxForm
from ..parts import check_limit
from .files import SUFFIX

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Trt"]

PER_STAGE = "per-stage"

SHORT_FLOATS = (8, 9)
"""The first compute capability with products of 8-bit floating-point numbers."""

ENGINE_LIMIT = 400_000_000
"""Most bytes of an engine's weights where nobody gave a limit."""

OPTIONS = (
    Option(
        "library",
        "--library",
        "TensorRT: what builds, and later runs. Default: tensorrt where it and a GPU are, else tensorrt-rtx.",
        choices=("tensorrt", "tensorrt-rtx"),
    ),
    Option(
        "layout",
        "--layout",
        "TensorRT: one engine for all stages, weights stored once (the default), or one for each.",
        choices=("shared", PER_STAGE),
    ),
    Option(
        "compute_capabilities",
        "--compute-capability",
        "TensorRT: a GPU to build for, such as 8.9; may be given more than once. In place of the GPU that is here.",
        metavar="X.Y",
        many=True,
    ),
    Option(
        "engine_limit",
        "--engine-limit",
        f"TensorRT: bytes of weights from which a graph is cut into several engines. Default: {ENGINE_LIMIT}.",
        metavar="BYTES",
    ),
)


class Trt(BuildTarget):
    """An engine with an optimisation profile per stage, its weights stored once."""

    name = "trt"
    suffix = SUFFIX
    schemes = (*FLOAT_SCHEMES, "w8a8", "fp8", "w4a16")
    joins_graphs = True
    symbolic = True
    holds_weights = True
    computes_as_stored = True
    packs_caches = True  # TensorRT orders outputs by chance, and no two engines would be the same
    needs_device = True
    loads_whole_files = True
    evaluator = "ort"
    build_options = OPTIONS

    def engine(self) -> tuple[str, str]:
        """Distribution that builds here, and its version."""
        from .library import building_library, installed_version

        name = building_library()
        return name, installed_version(name) or ""

    def engine_of(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The library that is asked for, and its version."""
        from .library import installed_version

        return options["library"], installed_version(options["library"]) or ""

    def check_version(self, name: str, version: str) -> None:
        """An engine is loaded by the library that built it, in the same version: TensorRT keeps no other compatible."""
        from .library import check_library

        check_library(name, version)

    def check_engine_options(self, options: EngineOptions) -> None:
        """Refuse what TensorRT does not have."""
        if options.threads or any(options.own.values()):
            raise UsageError(
                "target 'trt' runs on a GPU: it has no threads, no prepacking and no execution providers; "
                "leave them out"
            )
        check_own(self.name, self.engine_options, options.own)

    def gpus(self, options: EngineOptions) -> int:
        """The one that its engines run on."""
        return 1

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The library and the GPUs to build for are those that are asked for, or those that are here."""
        from .library import building_library, capabilities_to_build

        options = super().resolve_options(given)
        library = building_library(options["library"])
        capabilities = capabilities_to_build(library, options["compute_capabilities"])
        return {
            "library": library,
            "layout": options["layout"] or "shared",
            "compute_capabilities": list(capabilities),
            "engine_limit": _limit(options["engine_limit"]),
        }

    def check_options(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """The GPUs are compute capabilities."""
        checked = super().check_options(resolved)
        _limit(checked["engine_limit"])
        if not _are_capabilities(list(checked["compute_capabilities"])):
            raise UsageError(
                f"expected compute capabilities such as 8.9, found {checked['compute_capabilities']}"[:200]
            )
        return checked

    def takes(self, component: str) -> tuple[str, ...]:
        """Decoders compute in floating-point numbers."""
        return FLOAT_SCHEMES if component in DECODERS.values() else self.schemes

    def adapted(self, scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
        """The scheme, on GPUs that have arithmetic for it.

        Raises:
            UsageError: one that is built for has none for floats of 8 bits.
        """
        older = [name for name in options["compute_capabilities"] if tuple(map(int, name.split("."))) < SHORT_FLOATS]
        if scheme.dtype.startswith("float8") and older:
            raise UsageError(
                f"{scheme.name} needs a compute capability of {'.'.join(map(str, SHORT_FLOATS))} or later, "
                f"found {older[0]}: take --quantize w8a8"
            )
        return scheme

    def separates_graphs(self, options: Mapping[str, Any]) -> bool:
        """Whether the option `layout` asks for it."""
        return bool(options["layout"] == PER_STAGE)

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A profile of an engine."""
        from .session import TrtEngine

        return TrtEngine(file, spec, facts)

    def dialect(self) -> "Dialect":
        """Building blocks whose types are the graph's own."""
        from .dialect import TYPED

        return TYPED

    def write_program(
        self, name: str, forms: Sequence[OnnxForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Write NAME.engine of one network, with a profile for each of its graphs; NAME-2.engine, … where it is cut."""
        from .build import write_engines

        (form,) = forms
        return write_engines(form, folder, options)

    def file_plan(self, options: Mapping[str, Any]) -> Callable[[Sequence[OnnxForm]], Mapping[str, int]]:
        """The engines that networks will become, and the bytes of their weights; kernels are added to these."""
        from .build import plan_engines

        return lambda forms: plan_engines(forms[0], options)

    def evaluable(self, form: OnnxForm) -> None:
        """Weights are rounded as the engine stores them; all arithmetic is float32."""
        from .evaluate import widen

        widen(form.model)

    def network_digest(self, facts: Facts) -> str:
        """Digest of the network that the engine was built from."""
        return str(facts.get("network"))

    def check_facts(self, facts: Fields) -> None:
        """Check what `check.check_engine` found, and where the engine runs."""
        facts.get("library", "tensorrt or tensorrt-rtx", lambda v: v in ("tensorrt", "tensorrt-rtx"))
        facts.get("compute_capabilities", "a list of compute capabilities such as 8.9", _are_capabilities)
        facts.get("network", "64 hexadecimal digits", is_digest)
        for name in ("attention", "fused_attention", "products", "weights_bytes"):
            facts.integer(name, least=0)
        for name, least in (("activation_bytes", 0), ("rounded_products", 0), ("engines", 1)):
            if facts.document.get(name) is not None:
                facts.integer(name, least=least)

    def table(self, facts: Mapping[str, Facts]) -> Table:
        """What was found of the engines when they were built."""
        columns = ("graph", "compute capability", "engines", "attention fused", "products", "weight bytes")
        return Table("engines", (*columns, "activations MiB"), tuple(_row(*each) for each in facts.items()))


def _limit(text: str) -> str:
    """The most that the weights of an engine may take; empty: nobody gave a limit."""
    return text and check_limit("--engine-limit", text, ENGINE_LIMIT)


def _are_capabilities(value: Any) -> bool:
    texts = isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    return texts and all(re.fullmatch(r"\d{1,2}\.\d", item) for item in value)


def _row(name: str, found: Facts) -> tuple[str, ...]:
    activations = found["activation_bytes"]
    return (
        name,
        ", ".join(found["compute_capabilities"]),
        str(found.get("engines", 1)),
        f"{found['fused_attention']} of {found['attention']}",
        str(found["products"]),
        f"{found['weights_bytes']:,}",
        "" if activations is None else f"{activations / 2**20:,.0f}",
    )
