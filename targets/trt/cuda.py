"""The few calls of the CUDA runtime that a session needs, each one checked."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import CheckFailed, UsageError

__all__ = ["Cuda", "OutOfMemory"]


class OutOfMemory(CheckFailed):
    """The device has too little memory."""


class Cuda:
    """The CUDA runtime on the first visible device."""

    def __init__(self) -> None:
        """Find the driver and a GPU.

        Raises:
            UsageError: cuda-bindings, the driver or a GPU is missing.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UsageError(f"cuda-bindings is missing ({error}): pip install 'pyrexport[trt]'") from error
        self.runtime: Any = runtime
        try:
            status, count = runtime.cudaGetDeviceCount()
        except RuntimeError as error:  # where the bindings find no CUDA library at all
            raise UsageError(f"no NVIDIA driver is here, or it does not load: {error}"[:300]) from error
        name = status.name
        if name in ("cudaErrorInsufficientDriver", "cudaErrorStubLibrary"):
            raise UsageError(
                f"no NVIDIA driver is here, or it is older than CUDA {self._needed()} ({name}): "
                "sample on a machine with one; `parity --graph` compares without a GPU"
            )
        if name == "cudaErrorNoDevice" or (name == "cudaSuccess" and not count):
            raise UsageError("the NVIDIA driver finds no GPU here (cudaErrorNoDevice): sample on a machine with one")
        if name != "cudaSuccess":
            raise UsageError(f"CUDA cannot start here: {name}")
        self.call("cudaSetDevice", 0)

    def _needed(self) -> str:
        from importlib.metadata import version

        return version("cuda-bindings").split(".")[0]

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime.

        Raises:
            OutOfMemory: the device has too little memory.
            CheckFailed: it reports another error.
        """
        status, *values = getattr(self.runtime, name)(*arguments)
        if status.name == "cudaErrorMemoryAllocation":
            self.runtime.cudaGetLastError()  # else the next kernel's launch would be blamed for it
            raise OutOfMemory(f"{name} failed: {status.name}")
        if status.name != "cudaSuccess":
            raise CheckFailed(f"{name} failed: {status.name}")
        return values[0] if values else None

    def capability(self) -> str:
        """Compute capability of the device, such as "8.9"."""
        attributes = self.runtime.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    def upload(self, address: int, values: NDArray[Any], stream: Any) -> None:
        """Start a copy to the device; the array has to live until the stream is synchronised."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, values.ctypes.data, values.nbytes, kind, stream)

    def copy(self, address: int, source: int, nbytes: int, stream: Any) -> None:
        """Start a copy from one place of the device's memory to another."""
        self.call(
            "cudaMemcpyAsync", address, source, nbytes, self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream
        )

    def fetch(self, values: NDArray[np.generic], address: int) -> None:
        """Copy from the device, and wait; from any thread."""
        self.call("cudaSetDevice", 0)
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpy", values.ctypes.data, address, values.nbytes, kind)

    def download(self, values: NDArray[np.generic], address: int, stream: Any) -> None:
        """Start a copy from the device; the values are there when the stream is synchronised."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", values.ctypes.data, address, values.nbytes, kind, stream)
