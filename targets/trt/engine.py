"""An engine on the device: its file, the context that it runs in, and the kernels that are kept of it."""

import hashlib
import mmap
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...runtime.errors import CheckFailed, UsageError
from ...runtime.files import cache_folder, write_whole

__all__ = ["DeviceEngine", "DeviceTensor", "Errors", "kernels_file"]

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class DeviceTensor(NamedTuple):
    """A tensor in the device's memory."""

    address: int
    shape: tuple[int, ...]


class Errors:
    """What a library logged last of errors."""

    def __init__(self, trt: Any) -> None:
        """Nothing yet; `hear` is what the library's logger tells."""
        self.severities = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
        self.lines: list[str] = []

    def hear(self, severity: Any, message: str) -> None:
        """Take in a message."""
        if severity in self.severities:
            self.lines = [*self.lines[-1:], message]

    def last(self) -> str:
        """The last two lines, as one."""
        return " ".join(" ".join(self.lines).split())[:300] or "it does not say why"


class DeviceEngine:
    """An engine and its context, which computes one profile at a time."""

    def __init__(self, trt: Any, runtime: Any, file: Path, kernels: Path, errors: Errors, *, shares: bool) -> None:
        """Load an engine; the device is set.

        Args:
            trt: the library's module.
            runtime: its runtime.
            file: the engine's file.
            kernels: the file that its kernels are kept in, see `kernels_file`.
            errors: what the library logs.
            shares: its device memory is given to it, see `lend`.

        Raises:
            UsageError: the library refuses it.
            CheckFailed: the device has too little memory.
        """
        self.trt, self.file, self.errors = trt, file, errors
        self.profile: int | None = None
        with ExitStack() as undo:
            self.engine: Any = self._load(runtime)
            undo.callback(lambda: vars(self).pop("engine"))
            names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
            dtypes = {name: DTYPES.get(self.engine.get_tensor_dtype(name).name, "another type") for name in names}
            given = {name for name in names if self.engine.get_tensor_mode(name).name == "INPUT"}
            self.inputs = {name: dtype for name, dtype in dtypes.items() if name in given}
            self.outputs = {name: dtype for name, dtype in dtypes.items() if name not in given}
            self.context: Any = self._make_context(undo, kernels, shares)
            undo.callback(lambda: vars(self).pop("context"))
            self.undo = undo.pop_all()

    def close(self) -> None:
        """Free it, and keep its kernels for the next process."""
        self.undo.close()

    @property
    def profiles(self) -> int:
        """How many optimisation profiles it has."""
        return int(self.engine.num_optimization_profiles)

    def shape_of(self, tensor: str, profile: int) -> tuple[int, ...]:
        """Shape of an input in a profile."""
        return tuple(self.engine.get_tensor_profile_shape(tensor, profile)[1])

    @property
    def memory_bytes(self) -> int:
        """Device memory beside weights, of the largest profile."""
        return int(self.engine.device_memory_size_v2)

    def lend(self, address: int, nbytes: int) -> None:
        """Let it compute in memory that others compute in too, one after the other."""
        self.context.set_device_memory(address, nbytes)

    def enqueue(self, name: str, profile: int, tensors: Mapping[str, DeviceTensor], stream: Any) -> None:
        """Start a run of a profile on tensors that hold its inputs, and will hold its outputs.

        Raises:
            CheckFailed: TensorRT refuses it, or an output is of another shape than its memory is for.
        """
        handle = int(stream)
        if self.profile != profile:
            self._require(self.context.set_optimization_profile_async(profile, handle), name, "the profile")
            self.profile = profile
        for tensor in self.inputs:
            self._require(self.context.set_input_shape(tensor, tensors[tensor].shape), name, f"the shape of {tensor}")
        for tensor in self.outputs:
            shape, wanted = tuple(self.context.get_tensor_shape(tensor)), tensors[tensor].shape
            self._require(shape == wanted, name, f"an output of the manifest's shape {wanted}, it gives {shape}")
        for tensor in (*self.inputs, *self.outputs):
            self._require(
                self.context.set_tensor_address(tensor, tensors[tensor].address), name, f"the address of {tensor}"
            )
        self._require(self.context.execute_async_v3(handle), name, "to run")

    def _load(self, runtime: Any) -> Any:
        engine = None
        if not self.file.is_file():
            raise UsageError(f"{self.file.name} is missing: fetch or build the bundle again")
        if self.file.stat().st_size:
            with self.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            library, version = self.trt.__name__, self.trt.__version__
            raise UsageError(f"{library} {version} cannot load {self.file.name}: {self.errors.last()}")
        return engine

    def _make_context(self, undo: ExitStack, kernels: Path, shares: bool) -> Any:
        strategies = self.trt.ExecutionContextAllocationStrategy
        strategy = strategies.USER_MANAGED if shares else strategies.STATIC
        if hasattr(self.engine, "create_runtime_config"):
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if hasattr(config, "create_runtime_cache"):
                self._runtime_cache(config, undo, kernels)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise CheckFailed(f"{self.file.name}: no execution context, out of device memory? {self.errors.last()}")
        return context

    def _runtime_cache(self, config: Any, undo: ExitStack, kernels: Path) -> None:
        """TensorRT for RTX compiles kernels on the device: keep them for the next process."""
        cache = config.create_runtime_cache()
        before = b""
        with suppress(OSError):
            before = kernels.read_bytes()
        if before:
            cache.deserialize(before)  # one of another driver or GPU is refused, and replaced at the end
        if config.set_runtime_cache(cache):
            undo.callback(_keep, cache, kernels, before)

    def _require(self, done: bool, name: str, what: str) -> None:
        if not done:
            raise CheckFailed(f"{name}: TensorRT refuses {what}: {self.errors.last()}")


def kernels_file(file: Path, network: str, version: str, capability: str) -> Path:
    """Where the kernels of an engine are kept: one file for each network, engine, version and GPU."""
    identity = f"{network} {file.name} {version} {capability}"
    return cache_folder() / "trt" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cache"


def _keep(cache: Any, file: Path, before: bytes) -> None:
    """Write a runtime cache beside and rename it, if it grew; where that fails, kernels are compiled again."""
    blob = cache.serialize()
    if blob is None or bytes(memoryview(blob)) == before:
        return
    with suppress(OSError, UsageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, bytes(memoryview(blob)))
