"""A CUDA runtime and a TensorRT whose engines are evaluated by ONNX Runtime, for a machine without a GPU.

Copies and kernels happen when a stream is synchronised and not before; addresses, sizes, profiles and shapes are
checked as a GPU would not. Nothing of the session is replaced.
"""

import ctypes
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from pyrexport.runtime.bundle.opening import Bundle
from pyrexport.targets.parts import part_name
from pyrexport.targets.trt.files import engine_file


class Device:
    """Memory, streams and faults of a pretended GPU."""

    def __init__(self, capability: str = "8.9") -> None:
        self.capability = capability
        self.memory: dict[int, bytearray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.alive = 0
        """Engines and contexts."""
        self.calls: list[str] = []
        self.fault: tuple[str, int] = ("", 0)
        """A function, and which of its calls fails."""
        self.freed_early = False
        """Memory was freed before its stream was synchronised; an error would be lost in a finalizer."""
        self.room: float = math.inf
        """Bytes that can be allocated."""
        self.copied = {"in": 0, "out": 0, "within": 0}
        """Bytes, by the kind of the copy."""
        self.count_status = ("cudaSuccess", 1)
        self.numbers = itertools.count(0x7F0000000000, 1 << 32)

    @property
    def leaks(self) -> int:
        return len(self.memory) + len(self.streams) + self.alive

    def faulty(self, name: str) -> bool:
        self.calls.append(name)
        return self.fault == (name, self.calls.count(name))

    def view(self, address: int, nbytes: int) -> memoryview:
        """Bytes of one allocation, from its start: engines never compute with addresses."""
        assert address in self.memory, f"no allocation at {address:#x}"
        assert nbytes == len(self.memory[address]), f"{nbytes} bytes of an allocation of {len(self.memory[address])}"
        return memoryview(self.memory[address])

    def part(self, address: int, nbytes: int) -> memoryview:
        """Bytes within one allocation, which copies may take."""
        start = max((each for each in self.memory if each <= address), default=None)
        assert start is not None, f"no allocation at {address:#x}"
        assert address + nbytes <= start + len(self.memory[start]), f"{nbytes} bytes at {address:#x} are not its own"
        return memoryview(self.memory[start])[address - start : address - start + nbytes]


def status(name: str = "cudaSuccess") -> SimpleNamespace:
    return SimpleNamespace(name=name)


class Runtime:
    """What the session uses of `cuda.bindings.runtime`."""

    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out", cudaMemcpyDeviceToDevice="within"
    )
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
    )

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattribute__(self, name: str) -> Any:
        function = object.__getattribute__(self, name)
        if not callable(function) or not name.startswith("cuda"):
            return function

        def call(*arguments: Any) -> Any:
            if self.device.faulty(name):
                if name == "cudaStreamSynchronize":
                    self.device.streams[arguments[0]].clear()
                return status("cudaErrorUnknown"), None
            return function(*arguments)

        return call

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        name, count = self.device.count_status
        return status(name), count

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        assert device == 0
        return (status(),)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:  # noqa: N802
        return status(), int(self.device.capability.split(".")[attribute])

    def cudaStreamCreate(self) -> Any:  # noqa: N802
        stream = next(self.device.numbers)
        self.device.streams[stream] = []
        return status(), stream

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        assert not self.device.streams.pop(stream), "a stream is destroyed with work in it"
        return (status(),)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        work, self.device.streams[stream] = self.device.streams[stream], []
        for item in work:
            item()
        return (status(),)

    def cudaGetLastError(self) -> Any:  # noqa: N802
        return (status("cudaErrorMemoryAllocation"),)

    def cudaMalloc(self, nbytes: int) -> Any:  # noqa: N802
        if nbytes + sum(map(len, self.device.memory.values())) > self.device.room:
            return status("cudaErrorMemoryAllocation"), None
        address = next(self.device.numbers)
        self.device.memory[address] = bytearray(b"\xff" * nbytes)  # NaN, where a value is read before it is written
        return status(), address

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        self.device.freed_early |= any(self.device.streams.values())
        del self.device.memory[address]
        return (status(),)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: str, stream: int) -> Any:  # noqa: N802
        self.device.copied[kind] += nbytes
        if kind == "in":
            staged = ctypes.string_at(source, nbytes)
            work = lambda: _fill(self.device.view(to, nbytes), staged)  # noqa: E731
        elif kind == "out":
            work = lambda: ctypes.memmove(to, bytes(self.device.view(source, nbytes)), nbytes) and None  # noqa: E731
        else:
            work = lambda: _fill(self.device.view(to, nbytes), self.device.part(source, nbytes))  # noqa: E731
        self.device.streams[stream].append(work)
        return (status(),)

    def cudaMemcpy(self, to: int, source: int, nbytes: int, kind: str) -> Any:  # noqa: N802
        assert kind == "out"
        assert not any(self.device.streams.values()), "memory is read before its stream is synchronised"
        self.device.copied[kind] += nbytes
        ctypes.memmove(to, bytes(self.device.part(source, nbytes)), nbytes)
        return (status(),)


def _fill(view: memoryview, data: bytes) -> None:
    view[:] = data


@cache
def _session(file: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(file))


class Engine:
    """An engine's file: the networks of its profiles, each an ONNX file."""

    device_memory_size_v2 = 1000

    def __init__(self, device: Device, networks: Sequence[Path]) -> None:
        self.device = device
        self.sessions = [_session(network) for network in networks]
        self.inputs = [{value.name: tuple(value.shape) for value in s.get_inputs()} for s in self.sessions]
        self.outputs = [{value.name: tuple(value.shape) for value in s.get_outputs()} for s in self.sessions]
        self.names = [*self.inputs[0], *self.outputs[0]]
        device.alive += 1

    def __del__(self) -> None:
        self.device.alive -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.sessions)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.inputs[0] else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return 3 * [self.inputs[profile][name]]

    def create_runtime_config(self) -> Any:
        return Config(self.device)

    def create_execution_context(self, config: Any) -> Any:
        return None if self.device.faulty("create_execution_context") else Context(self, lent=config.strategy == "lent")


class Config:
    def __init__(self, device: Device) -> None:
        self.device = device

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return Cache(self.device)

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class Cache:
    def __init__(self, device: Device) -> None:
        self.device = device

    def deserialize(self, blob: bytes) -> bool:
        self.device.calls.append("cache read")
        return blob == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class Context:
    """An execution context: one profile at a time, shapes forgotten when it changes."""

    def __init__(self, engine: Engine, *, lent: bool) -> None:
        self.engine, self.profile = engine, -1
        self.lent: tuple[int, int] | None = None
        self.needs_memory = lent
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        engine.device.alive += 1

    def __del__(self) -> None:
        self.engine.device.alive -= 1

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert self.needs_memory
        assert nbytes >= self.engine.device_memory_size_v2
        self.lent = address, nbytes

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self.engine.device.streams
        self.profile, self.shapes = profile, {}
        return not self.engine.device.faulty("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        wanted = self.engine.get_tensor_profile_shape(name, self.profile)[0]
        return not self.engine.device.faulty("set_input_shape") and tuple(shape) == wanted

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.outputs[self.profile][name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.engine.device.faulty("set_tensor_address") and name in self.engine.names

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.device.faulty("execute_async_v3"):
            return False
        given, made = self.engine.inputs[self.profile], self.engine.outputs[self.profile]
        session, addresses = self.engine.sessions[self.profile], dict(self.addresses)
        assert self.shapes.keys() == given.keys(), "shapes are set again after a profile"

        def work() -> None:
            view = self.engine.device.view
            if self.needs_memory:
                assert self.lent is not None
                view(*self.lent)
            inputs = {}
            for name, shape in given.items():
                inputs[name] = np.frombuffer(view(addresses[name], 4 * math.prod(shape)), np.float32).reshape(shape)
            for name, value in zip(made, session.run(list(made), inputs), strict=True):
                _fill(view(addresses[name], value.nbytes), value.tobytes())

        self.engine.device.streams[stream].append(work)
        return True


def tensorrt(device: Device, bundle: Bundle, networks: Path) -> Any:
    """What the session uses of `tensorrt_rtx`, for a bundle whose networks are ONNX files of a folder."""
    files: dict[str, list[Path]] = {}
    for graph in bundle.manifest.graphs.values():
        for part in range(graph.facts.get("engines") or 1):
            entry = bundle.manifest.files[engine_file(Path(graph.file).stem, part)]
            files.setdefault(entry.sha256, []).append(networks / f"{part_name(graph.spec.name, part)}.onnx")

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    class TensorRt:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: Any) -> Any:
            found = files.get(hashlib.sha256(data[:]).hexdigest())
            if found is None or device.faulty("deserialize_cuda_engine"):
                self.logger.log(Logger.ERROR, "a magic tag does not match")
                return None
            return Engine(device, found)

    version = bundle.manifest.engine_version
    return SimpleNamespace(
        ILogger=Logger,
        Runtime=TensorRt,
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC="own", USER_MANAGED="lent"),
        __version__=version,
        __name__="tensorrt_rtx",
    )
