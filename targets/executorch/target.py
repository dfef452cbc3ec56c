"""What is particular to ExecuTorch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.engines import Engine, EngineOptions, Facts, at_least
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import UsageError
from ..facts import BuildTarget
from ..forms import Lowering, TorchForm

if TYPE_CHECKING:
    from ..dialect import Dialect

__all__ = ["Executorch"]

ENGINE = "executorch"


class Executorch(BuildTarget):
    """One program for all stages, one for the text encoder and one for the decoder, lowered to XNNPACK."""

    name = "executorch"
    form = TorchForm
    suffix = ".pte"
    schemes = ("fp32", "w8a8-dynamic", "w4a8")
    cache_schemes = ("fp32", "fp16")
    joins_graphs = True
    holds_weights = True
    process_bytes = 20 * 2**20  # measured with ExecuTorch 1.5

    def engine(self) -> tuple[str, str]:
        """The engine that is installed, and its version."""
        return ENGINE, version(ENGINE)

    def check_version(self, name: str, version: str) -> None:
        """Refuse what a newer engine wrote."""
        at_least(ENGINE, (name, version))

    def open_engine(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> Engine:
        """A method of a program."""
        from .session import ExecutorchEngine

        return ExecutorchEngine(file, spec, options)

    def dialect(self) -> "Dialect":
        """Building blocks that XNNPACK takes as one piece."""
        from .dialect import PORTABLE

        return PORTABLE

    def write_program(
        self, name: str, forms: Sequence[TorchForm], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Write NAME.pte with a method for each form; says what XNNPACK took of each.

        Raises:
            UsageError: ExecuTorch is here without what it needs to lower.
        """
        try:
            from .build import write_program
        except ImportError as error:
            raise UsageError(
                f"executorch is installed without its dependencies, which is enough to run and not to build ({error}): "
                "pip install 'pyrexport[export,executorch]'"
            ) from error

        return write_program(folder / f"{name}{self.suffix}", forms)

    def memory_plan(self, options: Mapping[str, Any]) -> Callable[[TorchForm], int]:
        """What a run takes, packed weights included, found by following it on paper."""
        from .memory import peak_bytes

        return peak_bytes

    def try_graph(self, file: Path, spec: GraphSpec, facts: Facts) -> int | None:
        """Load and run a method: lowering can succeed, and either of them still fail."""
        from ..trying import try_once

        return try_once(self.name, file, spec, facts, self.process_bytes)
