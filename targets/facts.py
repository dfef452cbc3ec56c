"""What a target states about itself for those who build, and the methods that building needs.

A target is one object: an instance of a subclass of `BuildTarget`, named by an entry point of the group
`pyrexport.targets`. Facts have defaults, so that a target says only what is particular to it. Its module imports
nothing heavy: the methods do.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle.engines import Facts, Option, Target, check_own, find_target
from ..runtime.bundle.graphs import GraphSpec
from ..runtime.errors import UsageError
from ..runtime.quantisation import FLOAT_SCHEMES, Scheme
from .forms import Lowering, OnnxForm, TorchForm

if TYPE_CHECKING:
    from .dialect import Dialect

__all__ = ["DEFAULT_TARGET", "BuildTarget", "find_build_target"]

DEFAULT_TARGET = "ort"
"""What is built where nobody says for what."""


class BuildTarget(Target):
    """A target that bundles can be built for."""

    form: type[OnnxForm] | type[TorchForm] = OnnxForm
    """The form in which it takes graphs."""
    suffix: str
    """Suffix of its files."""
    schemes: tuple[str, ...] = FLOAT_SCHEMES
    """Schemes that it can store, of `quantisation.SCHEMES`."""
    cache_schemes: tuple[str, ...] = ("fp32",)
    """Schemes that it can keep the decoder's caches in."""
    joins_graphs: bool = False
    """Graphs that are alike share a file: all stages, the text encoder's lengths, and the decoder's graphs."""
    symbolic: bool = False
    """Graphs that differ in their shapes alone are one network of symbolic shapes, a profile each."""
    holds_weights: bool = False
    """Its files hold the weights themselves, in place of pointing into the bundle's weights file."""
    computes_as_stored: bool = False
    """Arithmetic runs in the type that the weights are stored in, in place of float32."""
    computes: str = ""
    """Arithmetic that is its own: a name of `quantisation.ARITHMETIC`; empty: float32, or that of the stored type."""
    packs_caches: bool = False
    """The decoder's caches are one flat tensor, and its frames and new caches another."""
    evaluator: str = ""
    """The target that evaluates its networks where its device is not; empty: it needs none."""
    build_options: tuple[Option, ...] = ()
    """Its own options of a build."""

    @abstractmethod
    def engine(self) -> tuple[str, str]:
        """Distribution that builds for it here, and its version.

        Raises:
            ImportError, UsageError: it is not installed.
        """

    def engine_of(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The engine that its own options of a build choose, and its version."""
        return self.engine()

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each of its own options of a build, as JSON; what was not given is found out.

        Raises:
            UsageError: one is not known, or has an impossible value.
        """
        return check_own(self.name, self.build_options, given)

    def check_options(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """Its own options of a build as a bundle states them, whatever machine that was built on.

        Raises:
            UsageError: one is not known, or has an impossible value.
        """
        return check_own(self.name, self.build_options, resolved)

    def holds(self, component: str, options: Mapping[str, Any]) -> bool:
        """Whether its files hold a component's weights, where its own options are these."""
        return self.holds_weights

    def takes(self, component: str) -> tuple[str, ...]:
        """Schemes that it can store a component in."""
        return self.schemes

    def adapted(self, scheme: Scheme, options: Mapping[str, Any]) -> Scheme:
        """A scheme as its own options store it."""
        return scheme

    @abstractmethod
    def dialect(self) -> "Dialect":
        """How its graphs are written; may import torch."""

    def dialect_of(self, options: Mapping[str, Any]) -> "Dialect":
        """How they are written where its own options of a build are these."""
        return self.dialect()

    def separates_graphs(self, options: Mapping[str, Any]) -> bool:
        """Whether its own options ask for a file for each stage, where they would share one."""
        return False

    def files(self, program: str, graphs: Sequence[GraphSpec], options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the files that a program of some graphs is always written to; sessions are given the first one."""
        return (f"{program}{self.suffix}",)

    @abstractmethod
    def write_program(
        self, name: str, forms: Sequence[Any], folder: Path, options: Mapping[str, Any]
    ) -> Iterator[Lowering]:
        """Write the files of a program, NAME, into a bundle's folder, from the forms of its graphs; may import torch.

        Yields what it found for each graph, in order. The files are there when the last one has come.
        """

    def try_graph(self, file: Path, spec: GraphSpec, facts: Facts) -> int | None:
        """Run a graph that was written once, where writing it does not yet prove that it runs.

        Returns the memory that it took beyond `process_bytes`, in bytes, or None where it was not run.

        Raises:
            CheckFailed: it does not load or run.
        """
        return None

    def memory_plan(self, options: Mapping[str, Any]) -> Callable[[Any], int] | None:
        """What tells of a form, before it is built, the anonymous memory that a run of it will take; None: nothing."""
        return None

    def file_plan(self, options: Mapping[str, Any]) -> Callable[[Sequence[Any]], Mapping[str, int]] | None:
        """What tells of a program's forms, before it is built, the files that will hold its weights, and about how
        many bytes each will have; None: nothing."""
        return None

    def network_digest(self, facts: Facts) -> str:
        """What `digest.network_digest` said of the network that a graph's engine was built from."""
        raise UsageError(f"target '{self.name}' runs what it stores: leave out --graph")

    def evaluable(self, form: OnnxForm) -> None:
        """Change a network into one that its evaluator computes, with the rounding of its weights kept."""
        return


def find_build_target(name: str) -> BuildTarget:
    """The target of a name, to build for.

    Raises:
        UsageError: there is none, its engine is not installed, or it can only run.
    """
    target = find_target(name)
    if not isinstance(target, BuildTarget):
        raise UsageError(f"target '{name}' runs bundles that are there, and builds none")
    try:
        target.engine()
    except ImportError as error:
        raise UsageError(f"target '{name}' cannot build here: {error}; install its engine") from error
    return target
