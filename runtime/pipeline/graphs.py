"""The graphs of a bundle that are open: one at a time, those of a file together, or all."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.engines import Engine, EngineOptions, Held, HoldingEngine, Target
from ..bundle.graphs import PACKED, GraphKey
from ..bundle.opening import Bundle
from ..errors import UsageError
from .timings import Timings

__all__ = ["OpenGraphs"]


class OpenGraphs:
    """Opens engines when they are first needed, and closes the others unless it is resident."""

    def __init__(self, bundle: Bundle, target: Target, options: EngineOptions, *, resident: bool) -> None:
        """Take a bundle and its target; no graph is opened yet."""
        self.bundle, self.target, self.options, self.resident = bundle, target, options, resident
        self.timings = Timings()
        self._engines: dict[GraphKey, Engine] = {}

    def open(self, key: GraphKey) -> Engine:
        """The engine of a graph.

        Raises:
            UsageError: the bundle has no such graph, or the engine refuses it.
        """
        if key not in self._engines:
            entry = self.bundle.manifest.graphs.get(key)
            if entry is None:
                raise UsageError(f"{self.bundle.folder} has no graph '{key.name}'")
            if not self.resident:
                self._close_others(entry.file)
            start = time.perf_counter()
            file = self.bundle.file(entry.file)
            self._engines[key] = self.target.open_engine(file, entry.spec, entry.facts, self.options)
            self.timings.load += time.perf_counter() - start
        return self._engines[key]

    def run(self, key: GraphKey, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate a graph."""
        engine = self.open(key)
        with self._timed(key):
            return engine.run(inputs)

    def run_packed(self, key: GraphKey, inputs: Mapping[str, NDArray[Any] | Held]) -> NDArray[Any] | Held:
        """Evaluate a graph whose only output is `PACKED`, and leave that where it is, if the engine can."""
        engine = self.open(key)
        with self._timed(key):
            if isinstance(engine, HoldingEngine):
                return engine.run_held(inputs)
            return engine.run({name: np.asarray(value) for name, value in inputs.items()})[PACKED]

    @contextmanager
    def _timed(self, key: GraphKey) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings.engine[key.name] = self.timings.engine.get(key.name, 0.0) + time.perf_counter() - start

    def _close_others(self, file: str) -> None:
        graphs = self.bundle.manifest.graphs
        for key in list(self._engines):
            if not (self.target.loads_whole_files and graphs[key].file == file):
                self._engines.pop(key).close()

    def close(self) -> None:
        """Close all engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
