"""What is particular to Qualcomm's Hexagon tensor processor (HTP), through ONNX Runtime's provider for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, Option, Table, at_least
from ...runtime.bundle.entries import is_digest
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.bundle.manifest import WEIGHTS_FILE
from ...runtime.documents import Fields
from ...runtime.errors import UsageError
from ...runtime.quantisation import DECODERS
from ..facts import BuildTarget
from ..forms import Lowering, OnnxForm
from ..parts import check_limit
from .chips import CHIPS, chip_table, find_chips
from .names import DISTRIBUTION, is_on_cpu, program_files

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Qnn"]

CONTEXT_LIMIT = 1_100_000_000
"""Most bytes of weights in a context. The compiler makes up to 1.8 times as many of them, and a buffer has 2 GB."""

OPTIONS = (
    Option(
        "soc",
        "--soc",
        "Snapdragon: a chip to compile for, such as sm8750; may be given more than once; list shows them all.",
        metavar="NAME",
        many=True,
        listing=chip_table,
    ),
    Option(
        "share_weights",
        "--share-weights",
        "Snapdragon: weights once for all stages. Such contexts are opened by a chip alone, not by the emulation.",
        switch=True,
    ),
    Option(
        "decoder_on",
        "--decoder-on",
        "Snapdragon: what decodes videos, the tensor processor (htp, the default) or the CPU (cpu).",
        choices=("htp", "cpu"),
    ),
    Option(
        "finalisation",
        "--finalisation",
        "Snapdragon: how long the compiler thinks, 0 (the provider's default) to 3. Default: 1, thirteen times faster.",
        choices=("0", "1", "2", "3"),
    ),
    Option(
        "context_limit",
        "--context-limit",
        f"Snapdragon: bytes of weights from which a graph is cut into several contexts. Default: {CONTEXT_LIMIT}.",
        metavar="BYTES",
    ),
)


class Qnn(BuildTarget):
    """For each chip a compiled context of each graph, computed in 16-bit floating-point numbers."""

    name = "qnn"
    suffix = ".bin"
    schemes = ("fp16", "w8a16")
    joins_graphs = True
    holds_weights = True
    computes = "all-fp16"
    evaluator = "qnn"
    build_options = OPTIONS
    engine_options = (Option("chip", "--chip", "Of a bundle for several chips, the one to run.", metavar="NAME"),)

    def engine(self) -> tuple[str, str]:
        """The provider that is installed, and its version."""
        from .provider import check_installed

        return DISTRIBUTION, check_installed()

    def check_version(self, name: str, version: str) -> None:
        """Refuse what a newer provider compiled."""
        at_least(DISTRIBUTION, (name, version))

    def holds(self, component: str, options: Mapping[str, Any]) -> bool:
        """Graphs for the CPU find their weights in the bundle's file."""
        return not is_on_cpu(component, options)

    def takes(self, component: str) -> tuple[str, ...]:
        """The text encoder is computed in float32 whatever it is stored in."""
        if component in DECODERS.values():
            return ("fp16",)
        return ("fp32", "bf16") if component == "text_encoder" else self.schemes

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The chips by their part numbers."""
        options = super().resolve_options(given)
        return options | {
            "soc": [chip.name for chip in find_chips(options["soc"])],
            "decoder_on": options["decoder_on"] or "htp",
            "finalisation": options["finalisation"] or "1",
            "context_limit": check_limit(
                "--context-limit", options["context_limit"] or str(CONTEXT_LIMIT), CONTEXT_LIMIT
            ),
        }

    def remark(self) -> str:
        """Whether the processor is emulated."""
        from .provider import is_emulated

        return "the tensor processor is emulated here: times mean nothing" if is_emulated() else ""

    def dialect(self) -> "Dialect":
        """Operators of the standard on few axes."""
        from .dialect import HEXAGON

        return HEXAGON

    def files(self, program: str, graphs: Sequence[GraphSpec], options: Mapping[str, Any]) -> tuple[str, ...]:
        """For each chip the contexts, and a small graph for each that refers to its own."""
        return program_files(program, graphs, options)

    def write_program(
        self, name: str, forms: Sequence[OnnxForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Compile the graphs for each chip, or write those for the CPU."""
        from .build import write_contexts

        return write_contexts(name, forms, folder, options)

    def try_graph(self, file: Path, spec: GraphSpec, facts: Facts) -> int | None:
        """Load each context and run it in the emulation, where that opens it."""
        from .build import try_contexts

        return try_contexts(file.parent, spec, facts)

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A context of a chip, a graph on the CPU, or a network that is compiled now."""
        from .session import QnnEngine

        return QnnEngine(file, spec, facts, options)

    def file_plan(self, options: Mapping[str, Any]) -> Callable[[Sequence[OnnxForm]], Mapping[str, int]]:
        """The contexts that networks will become, and the bytes of their weights, which the compiler adds to."""
        from .build import plan_contexts

        return lambda forms: plan_contexts(forms, options)

    def network_digest(self, facts: Facts) -> str:
        """Digest of the network that contexts were compiled from."""
        return str(facts.get("network"))

    def evaluable(self, form: OnnxForm) -> None:
        """The emulation compiles networks as they are."""

    def check_facts(self, facts: Fields) -> None:
        """Check the chips, and whether contexts share their weights."""
        chips = facts.document.get("chips")
        if not isinstance(chips, list) or not all(chip in CHIPS for chip in chips):
            raise UsageError(f"expected chips of {', '.join(CHIPS)}, found {chips!r:.60}")
        facts.get("shared", "true or false", lambda value: isinstance(value, bool))
        facts.get(
            "heads", "64 hexadecimal digits for each context of each chip", lambda value: _are_heads(value, chips)
        )
        facts.text("finalisation", choices=("0", "1", "2", "3"))
        facts.get("network", "64 hexadecimal digits", is_digest)

    def table(self, facts: Mapping[str, Facts]) -> Table:
        """Where each graph runs."""
        rows = tuple((name, ", ".join(found["chips"]) or "CPU", _where(found)) for name, found in facts.items())
        return Table("where graphs run", ("graph", "chips", "weights"), rows)


def _where(found: Facts) -> str:
    """In which files a graph's weights lie."""
    if not found["chips"]:
        return WEIGHTS_FILE
    count = len(next(iter(found["heads"].values())))
    whose = "with those of other graphs" if found["shared"] else "its own"
    return whose if count == 1 else f"{whose}, in {count} contexts"


def _are_heads(value: Any, chips: list[str]) -> bool:
    """Digests of the contexts of each chip, as many for each."""
    if not isinstance(value, dict) or sorted(value) != sorted(chips):
        return False
    lists = all(isinstance(heads, list) and heads and all(map(is_digest, heads)) for heads in value.values())
    return lists and len(set(map(len, value.values()))) <= 1
