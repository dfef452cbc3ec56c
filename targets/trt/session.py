"""Graphs of a TensorRT engine: NumPy in and out, one context and one stream for all profiles of a file."""

import hashlib
import math
import mmap
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle.engines import Facts, check_inputs
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.dtypes import DTYPES as SIZES
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.files import cache_folder, write_whole
from .cuda import Cuda
from .library import import_library, listening

__all__ = ["TrtEngine"]

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


class TrtEngine:
    """One graph: an optimisation profile of an engine, with device buffers of its own."""

    def __init__(self, file: Path, spec: GraphSpec, facts: Facts) -> None:
        """Load the engine's file unless another of its graphs is open, and allocate the graph's buffers.

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
            self.addresses: dict[str, int] = {}
            cuda = self.program.cuda
            for tensor in (*spec.inputs, *spec.outputs):
                nbytes = math.prod(tensor.shape) * SIZES[tensor.dtype].nbytes
                self.addresses[tensor.name] = int(cuda.call("cudaMalloc", nbytes))
                undo.callback(cuda.call, "cudaFree", self.addresses[tensor.name])
            self.undo: ExitStack | None = undo.pop_all()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph; from several threads, one after the other.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: CUDA or TensorRT fails in it.
        """
        check_inputs(self.spec.inputs, inputs)
        arrays = {tensor.name: np.ascontiguousarray(inputs[tensor.name]) for tensor in self.spec.inputs}
        outputs = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in self.spec.outputs}
        with self.program.lock:
            if self.undo is None:
                raise CheckFailed(f"{self.name} is closed")
            self.program.execute(self.name, self.profile, self.addresses, arrays, outputs)
        return outputs

    def close(self) -> None:
        """Free the buffers, and the engine with its last graph."""
        with self.program.lock:
            undo, self.undo = self.undo, None
        if undo is not None:
            undo.close()


class _Program:
    """An engine's file on the device, shared by its open graphs."""

    opened: dict[Path, "_Program"] = {}  # noqa: RUF012
    opening = threading.RLock()

    @classmethod
    def open(cls, file: Path, facts: Facts) -> "_Program":
        """The program of a file, loaded if it is not."""
        with cls.opening:
            key = file.resolve()
            if key not in cls.opened:
                cls.opened[key] = cls(key, facts)
            cls.opened[key].users += 1
            return cls.opened[key]

    def release(self) -> None:
        """One graph less; with the last one everything is freed."""
        with self.opening:
            self.users -= 1
            if self.users == 0:
                del self.opened[self.file]
                self.undo.close()

    def __init__(self, file: Path, facts: Facts) -> None:
        self.file, self.users, self.lock = file, 0, threading.Lock()
        self.trt: Any = import_library(facts["library"])
        self.cuda = Cuda()
        self._check_device(facts["compute_capabilities"])
        self.errors = _Errors(self.trt)
        with ExitStack() as undo:
            logger = undo.enter_context(listening(self.trt, self.errors.hear))
            self.stream = self.cuda.call("cudaStreamCreate")
            undo.callback(lambda: self.cuda.call("cudaStreamDestroy", self.stream))
            self.runtime: Any = self.trt.Runtime(logger)
            undo.callback(lambda: vars(self).pop("runtime"))
            self.engine: Any = self._load()
            undo.callback(lambda: vars(self).pop("engine"))
            self.context: Any = self._make_context(undo, facts)
            undo.callback(lambda: vars(self).pop("context"))
            self.profile: int | None = None
            self.undo = undo.pop_all()

    def _check_device(self, capabilities: list[str]) -> None:
        found = self.cuda.capability()
        if found not in capabilities:
            raise UsageError(
                f"{self.file.name} was built for compute capability {' or '.join(capabilities)}, this GPU has {found}: "
                f"build again with --compute-capability {found}"
            )

    def _load(self) -> Any:
        engine = None
        if self.file.stat().st_size:
            with self.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            library, version = self.trt.__name__, self.trt.__version__
            raise UsageError(f"{library} {version} cannot load {self.file.name}: {self.errors.last()}")
        return engine

    def _make_context(self, undo: ExitStack, facts: Facts) -> Any:
        if hasattr(self.engine, "create_runtime_config"):
            config = self.engine.create_runtime_config()
            if hasattr(config, "create_runtime_cache"):
                self._runtime_cache(config, undo, facts)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise CheckFailed(f"{self.file.name}: no execution context, out of device memory? {self.errors.last()}")
        return context

    def _runtime_cache(self, config: Any, undo: ExitStack, facts: Facts) -> None:
        """TensorRT for RTX compiles kernels on the device: keep them for the next process."""
        cache = config.create_runtime_cache()
        identity = f"{facts['network']} {self.file.name} {self.trt.__version__} {self.cuda.capability()}"
        kept = cache_folder() / "trt" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cache"
        before = b""
        with suppress(OSError):
            before = kept.read_bytes()
        if before:
            cache.deserialize(before)  # one of another driver or GPU is refused, and replaced at the end
        if config.set_runtime_cache(cache):
            undo.callback(_keep, cache, kept, before)

    def find_profile(self, name: str, spec: GraphSpec) -> int:
        """The profile whose shapes are a graph's; all tensors must be the manifest's."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        dtypes = {tensor: DTYPES.get(self.engine.get_tensor_dtype(tensor).name) for tensor in names}
        if dtypes == {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}:
            for profile in range(self.engine.num_optimization_profiles):
                shapes = (
                    (self.engine.get_tensor_profile_shape(tensor.name, profile)[1], tensor.shape)
                    for tensor in spec.inputs
                )
                if all(tuple(found) == wanted for found, wanted in shapes):
                    return profile
        raise UsageError(
            f"{name} is not in the engine of its manifest: no profile with its shapes, found {dtypes}"[:400]
        )

    def execute(
        self,
        name: str,
        profile: int,
        addresses: Mapping[str, int],
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> None:
        """Copy in, run, copy out, and wait; on an error wait as well, so that no copy outlives its array."""
        handle = int(self.stream)
        self.cuda.call("cudaSetDevice", 0)  # of this thread
        try:
            if self.profile != profile:
                self._require(self.context.set_optimization_profile_async(profile, handle), name, "the profile")
                self.profile = profile
            for tensor, array in inputs.items():
                self._require(self.context.set_input_shape(tensor, array.shape), name, f"the shape of {tensor}")
                self.cuda.upload(addresses[tensor], array, self.stream)
            for tensor, array in outputs.items():
                shape = tuple(self.context.get_tensor_shape(tensor))
                self._require(
                    shape == array.shape, name, f"an output of the manifest's shape {array.shape}, it gives {shape}"
                )
            for tensor, address in addresses.items():
                self._require(self.context.set_tensor_address(tensor, address), name, f"the address of {tensor}")
            self._require(self.context.execute_async_v3(handle), name, "to run")
            for tensor, array in outputs.items():
                self.cuda.download(array, addresses[tensor], self.stream)
        except BaseException:
            self.profile = None
            with suppress(CheckFailed):
                self.cuda.call("cudaStreamSynchronize", self.stream)
            raise
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def _require(self, done: bool, name: str, what: str) -> None:
        if not done:
            raise CheckFailed(f"{name}: TensorRT refuses {what}: {self.errors.last()}")


class _Errors:
    """What the library logged last of errors."""

    def __init__(self, trt: Any) -> None:
        self.severities = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
        self.lines: list[str] = []

    def hear(self, severity: Any, message: str) -> None:
        if severity in self.severities:
            self.lines = [*self.lines[-1:], message]

    def last(self) -> str:
        """The last two lines, as one."""
        return " ".join(" ".join(self.lines).split())[:300] or "it does not say why"


def _keep(cache: Any, file: Path, before: bytes) -> None:
    """Write a runtime cache beside and rename it, if it grew; where that fails, kernels are compiled again."""
    blob = cache.serialize()
    if blob is None or bytes(memoryview(blob)) == before:
        return
    with suppress(OSError, UsageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, bytes(memoryview(blob)))
