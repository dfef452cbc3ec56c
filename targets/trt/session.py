"""Graphs of TensorRT engines: NumPy in and out, one stream for all profiles of a program's engines."""

import math
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle.engines import Facts, Held, check_inputs
from ...runtime.bundle.graphs import GraphSpec, TensorSpec
from ...runtime.dtypes import DTYPES
from ...runtime.errors import CheckFailed, UsageError
from .cuda import Cuda, OutOfMemory
from .engine import DeviceEngine, DeviceTensor, Errors, kernels_file
from .files import engine_file
from .library import import_library, listening
from .memory import DeviceArray, DeviceMemory

__all__ = ["TrtEngine"]


class TrtEngine:
    """One graph: an optimisation profile of an engine, or of several in turn, with device buffers of its own."""

    def __init__(self, file: Path, spec: GraphSpec, facts: Facts) -> None:
        """Load the program of a file unless another of its graphs is open, and allocate the graph's buffers.

        Raises:
            UsageError: the library, the driver or a GPU is missing, the GPU is none that the engine was built for, or
                the engine is not the one of its manifest.
            CheckFailed: the device has too little memory.
        """
        self.name, self.spec = f"{file.name}: {spec.name}", spec
        with ExitStack() as undo:
            self.program = _Program.open(file, facts)
            undo.callback(self.program.release)
            self.profile = self.program.find_profile(self.name, spec)
            self.tensors: dict[str, DeviceTensor] = {}
            self.memory: dict[str, DeviceMemory] = {}
            undo.callback(self.memory.clear)
            for tensor in (*spec.inputs, *spec.outputs):
                self._claim(tensor)
            self._claim_crossing()
            self.undo: ExitStack | None = undo.pop_all()

    def _claim(self, tensor: TensorSpec) -> None:
        """Memory of a tensor, in place of what it had: that is freed unless somebody holds it."""
        self.memory[tensor.name] = DeviceMemory(self.program.cuda, _nbytes(tensor.shape, tensor.dtype))
        self.tensors[tensor.name] = DeviceTensor(self.memory[tensor.name].address, tensor.shape)

    def _claim_crossing(self) -> None:
        """Memory of what goes from engine to engine, where it takes over that of what is needed no more."""
        engines, own = self.program.engines, set(self.tensors)
        last = {tensor: index for index, engine in enumerate(engines) for tensor in engine.inputs}
        free: defaultdict[int, list[int]] = defaultdict(list)
        sizes: dict[str, int] = {}
        for index, engine in enumerate(engines):
            for tensor in (each for each in engine.outputs if each not in own):
                spec = TensorSpec(tensor, engines[last[tensor]].shape_of(tensor, self.profile), engine.outputs[tensor])
                sizes[tensor] = nbytes = _nbytes(spec.shape, spec.dtype)
                if free[nbytes]:
                    self.tensors[tensor] = DeviceTensor(free[nbytes].pop(), spec.shape)
                else:
                    self._claim(spec)
            for tensor in engine.inputs:
                if last[tensor] == index and tensor not in own:
                    free[sizes[tensor]].append(self.tensors[tensor].address)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph; from several threads, one after the other.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: CUDA or TensorRT fails in it.
        """
        check_inputs(self.spec.inputs, inputs)
        outputs = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in self.spec.outputs}
        with self.program.lock:
            self._execute(inputs, outputs)
        return outputs

    def run_held(self, inputs: Mapping[str, NDArray[Any] | Held]) -> NDArray[Any] | Held:
        """Evaluate a graph of one flat output, which stays on the device; see `HoldingEngine`.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: CUDA or TensorRT fails in it.
        """
        check_inputs(self.spec.inputs, inputs, (DeviceArray,))
        (spec,) = self.spec.outputs
        with self.program.lock:
            self._execute(inputs, {})
            held = DeviceArray(self.memory[spec.name], spec.dtype, *spec.shape)
            try:
                self._claim(spec)
            except OutOfMemory:
                return np.asarray(held)
        return held

    def _execute(self, inputs: Mapping[str, NDArray[Any] | Held], outputs: Mapping[str, NDArray[Any]]) -> None:
        if self.undo is None:
            raise CheckFailed(f"{self.name} is closed")
        self.program.execute(self.name, self.profile, self.tensors, inputs, outputs)

    def close(self) -> None:
        """Free the buffers, and the engines with their last graph."""
        with self.program.lock:
            undo, self.undo = self.undo, None
        if undo is not None:
            undo.close()


class _Program:
    """A program's engines on the device, shared by its open graphs."""

    opened: dict[Path, "_Program"] = {}  # noqa: RUF012
    opening = threading.RLock()

    @classmethod
    def open(cls, file: Path, facts: Facts) -> "_Program":
        """The program whose first engine lies in a file, loaded if it is not."""
        with cls.opening:
            key = file.resolve()
            if key not in cls.opened:
                cls.opened[key] = cls(file, facts)
            cls.opened[key].users += 1
            return cls.opened[key]

    def release(self) -> None:
        """One graph less; with the last one everything is freed."""
        with self.opening:
            self.users -= 1
            if self.users == 0:
                del self.opened[self.key]
                self.undo.close()

    def __init__(self, file: Path, facts: Facts) -> None:
        self.key, self.users, self.lock = file.resolve(), 0, threading.Lock()
        trt = import_library(facts["library"])
        self.cuda = Cuda()
        capability = self._check_device(file, facts["compute_capabilities"])
        errors = Errors(trt)
        count = facts.get("engines") or 1
        files = (file.with_name(engine_file(file.stem, index)) for index in range(count))
        self.engines: list[DeviceEngine] = []
        with ExitStack() as undo:
            logger = undo.enter_context(listening(trt, errors.hear))
            self.stream = self.cuda.call("cudaStreamCreate")
            undo.callback(lambda: self.cuda.call("cudaStreamDestroy", self.stream))
            self.runtime: Any = trt.Runtime(logger)
            undo.callback(lambda: vars(self).pop("runtime"))
            undo.callback(self.engines.clear)
            for each in files:
                kernels = kernels_file(each, facts["network"], trt.__version__, capability)
                self.engines.append(DeviceEngine(trt, self.runtime, each, kernels, errors, shares=count > 1))
                undo.callback(self.engines[-1].close)
            if count > 1:
                self._lend_memory(undo)
            self.undo = undo.pop_all()

    def _check_device(self, file: Path, capabilities: list[str]) -> str:
        found = self.cuda.capability()
        if found not in capabilities:
            raise UsageError(
                f"{file.name} was built for compute capability {' or '.join(capabilities)}, this GPU has {found}: "
                f"build again with --compute-capability {found}"
            )
        return found

    def _lend_memory(self, undo: ExitStack) -> None:
        """Engines that run in turn compute in the same memory."""
        nbytes = max(1, *(engine.memory_bytes for engine in self.engines))
        address = int(self.cuda.call("cudaMalloc", nbytes))
        undo.callback(self.cuda.call, "cudaFree", address)
        for engine in self.engines:
            engine.lend(address, nbytes)

    def find_profile(self, name: str, spec: GraphSpec) -> int:
        """The profile whose shapes are a graph's; all tensors must be the manifest's, or go from engine to engine."""
        known, asked = {tensor.name: tensor.dtype for tensor in spec.inputs}, set[str]()
        for engine in self.engines:
            strange = next((tensor for tensor, dtype in engine.inputs.items() if known.get(tensor) != dtype), None)
            if strange is not None:
                raise UsageError(
                    f"{engine.file.name} is not the engine of its manifest: it takes '{strange}' in "
                    f"{engine.inputs[strange]}, which neither {spec.name} nor an engine before it is given or gives; "
                    "fetch or build the bundle again"
                )
            asked |= engine.inputs.keys()
            known |= engine.outputs
        made = {tensor: dtype for tensor, dtype in known.items() if tensor not in asked}
        whole = asked.issuperset(tensor.name for tensor in spec.inputs)
        if whole and made == {tensor.name: tensor.dtype for tensor in spec.outputs}:
            for profile in range(min(engine.profiles for engine in self.engines)):
                if all(
                    engine.shape_of(tensor.name, profile) == tensor.shape
                    for engine in self.engines
                    for tensor in spec.inputs
                    if tensor.name in engine.inputs
                ):
                    return profile
        raise UsageError(
            f"{name} is not in the engine of its manifest: no profile with its shapes, found {known}"[:400]
        )

    def execute(
        self,
        name: str,
        profile: int,
        tensors: Mapping[str, DeviceTensor],
        inputs: Mapping[str, NDArray[Any] | Held],
        outputs: Mapping[str, NDArray[Any]],
    ) -> None:
        """Copy in, run, copy out, and wait; on an error wait as well, so that no copy outlives its array."""
        self.cuda.call("cudaSetDevice", 0)  # of this thread
        arrays = {name: v if isinstance(v, DeviceArray) else np.ascontiguousarray(v) for name, v in inputs.items()}
        try:
            for tensor, array in arrays.items():
                if isinstance(array, DeviceArray):
                    self.cuda.copy(tensors[tensor].address, array.address, array.nbytes, self.stream)
                else:
                    self.cuda.upload(tensors[tensor].address, array, self.stream)
            for engine in self.engines:
                engine.enqueue(name, profile, tensors, self.stream)
            for tensor, array in outputs.items():
                self.cuda.download(array, tensors[tensor].address, self.stream)
        except BaseException:
            for engine in self.engines:
                engine.profile = None
            with suppress(CheckFailed):
                self.cuda.call("cudaStreamSynchronize", self.stream)
            raise
        self.cuda.call("cudaStreamSynchronize", self.stream)


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].nbytes
