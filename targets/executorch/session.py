"""A method of an ExecuTorch program: NumPy in and out, through a small library that is compiled on first use.

The wheel of ExecuTorch holds libraries and headers that need no torch; its own Python interface imports torch and
takes torch's tensors alone. Where there is no compiler, that interface is used.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle.engines import EngineOptions, check_inputs
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.machine import usable_cores
from ..quiet import silenced
from .compile import NoCompiler, library_file

__all__ = ["ExecutorchEngine"]

MOST_TENSORS = 1024
"""Inputs and outputs that a method may have."""

DTYPES = {5: "float16", 6: "float32"}
"""ExecuTorch's numbers of the dtypes that graphs take and give."""


class _Backend(Protocol):
    """A loaded method: what it takes and gives, and how it is run."""

    inputs: list[tuple[str, list[int]]]
    outputs: list[tuple[str, list[int]]]

    def run(self, inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]) -> None: ...

    def close(self) -> None: ...


class ExecutorchEngine:
    """One method. Its weights are packed into XNNPACK's layout once, and shared by the methods that are open."""

    def __init__(self, file: Path, spec: GraphSpec, options: EngineOptions) -> None:
        """Load a method.

        Raises:
            UsageError: ExecuTorch refuses the program, or it is not the one of its manifest.
        """
        self.name, self.spec, self.lock = f"{file.name}: {spec.name}", spec, threading.Lock()
        library = _library()
        self.backend: _Backend | None = (
            _Official(file, spec.name)
            if library is None
            else _Shim(library, file, spec.name, options.threads or usable_cores())
        )
        for kind, found, specs in (
            ("inputs", self.backend.inputs, spec.inputs),
            ("outputs", self.backend.outputs, spec.outputs),
        ):
            wanted = [(tensor.dtype, list(tensor.shape)) for tensor in specs]
            if found != wanted:
                self.close()
                raise UsageError(
                    f"{self.name} is not the method of its manifest: expected {kind} {wanted}, found {found}"[:400]
                )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the method; from several threads, one after the other.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: ExecuTorch fails in it.
        """
        check_inputs(self.spec.inputs, inputs)
        arrays = [np.ascontiguousarray(inputs[tensor.name]) for tensor in self.spec.inputs]
        outputs = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in self.spec.outputs}
        with self.lock:
            if self.backend is None:
                raise CheckFailed(f"{self.name} is closed")
            self.backend.run(arrays, list(outputs.values()))
        return outputs

    def close(self) -> None:
        """Free the method."""
        with self.lock:
            if self.backend is not None:
                self.backend.close()
                self.backend = None


@cache
def _library() -> ctypes.CDLL | None:
    try:
        with library_file() as file:
            library = ctypes.CDLL(str(file))
    except NoCompiler as error:
        note = "using executorch.runtime with torch, which starts slower and chooses its own threads"
        logging.getLogger("pyrexport").warning("pyrexport: %s; %s", error, note)
        return None
    except OSError as error:
        raise UsageError(f"the compiled ExecuTorch session cannot be loaded: {error}"[:300]) from error
    library.pyrexport_close.restype = None
    return library


class _Shim:
    """A method through the compiled library."""

    def __init__(self, library: ctypes.CDLL, file: Path, method: str, threads: int) -> None:
        self.library, self.file, self.method = library, file, method.encode()
        self.text = ctypes.create_string_buffer(512)
        self.program = ctypes.c_void_p()
        self._call(UsageError, "open", os.fsencode(file), ctypes.c_uint32(threads), ctypes.byref(self.program))
        self.specs = (ctypes.c_int32 * (10 * MOST_TENSORS))()
        self.counts = (ctypes.c_size_t * 2)()
        try:
            capacity = ctypes.c_size_t(MOST_TENSORS)
            self._call(UsageError, "load", self.program, self.method, self.specs, capacity, self.counts)
        except UsageError:
            self.close()
            raise
        first, last = self.counts[0], self.counts[0] + self.counts[1]
        tensors = [self._tensor(10 * index) for index in range(last)]
        self.inputs, self.outputs = tensors[:first], tensors[first:]

    def _tensor(self, at: int) -> tuple[str, list[int]]:
        dtype, rank = self.specs[at], self.specs[at + 1]
        return DTYPES.get(dtype, f"dtype {dtype}"), list(self.specs[at + 2 : at + 2 + rank])

    def _call(self, kind: type[Exception], name: str, *arguments: Any) -> None:
        size = ctypes.c_size_t(len(self.text))
        if getattr(self.library, f"pyrexport_{name}")(*arguments, self.text, size):
            line = " ".join(self.text.value.decode("utf-8", "replace").split())
            raise kind(f"executorch cannot {name} {self.file.name}: {line}")

    def run(self, inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]) -> None:
        pointers = [(ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (inputs, outputs)]
        self._call(CheckFailed, "run", self.program, self.method, self.specs, self.counts, *pointers)

    def close(self) -> None:
        if self.program:
            self.library.pyrexport_close(self.program)
            self.program = ctypes.c_void_p()


class _Official:
    """A method through executorch.runtime, which needs torch. It has no option for threads."""

    def __init__(self, file: Path, method: str) -> None:
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with silenced(2):
                from executorch.runtime import Runtime, Verification
        except ImportError as error:
            raise UsageError(
                f"without a C++ compiler, a session of executorch needs its whole Python package and torch: {error}"
            ) from error
        try:
            with silenced(2):
                self.program = Runtime.get().load_program(file, verification=Verification.InternalConsistency)
                self.method: Any = self.program.load_method(method)
        except Exception as error:  # its bindings raise RuntimeError and others
            raise UsageError(f"executorch cannot load {file.name}: {error}"[:300]) from error
        meta = self.method.metadata
        self.file = file
        self.inputs = [self._tensor(meta.input_tensor_meta(i)) for i in range(meta.num_inputs())]
        self.outputs = [self._tensor(meta.output_tensor_meta(i)) for i in range(meta.num_outputs())]

    @staticmethod
    def _tensor(info: Any) -> tuple[str, list[int]]:
        return DTYPES.get(info.dtype(), f"dtype {info.dtype()}"), list(info.sizes())

    def run(self, inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]) -> None:
        from importlib import import_module

        torch = import_module("torch")
        try:
            results = self.method.execute([torch.from_numpy(array) for array in inputs])
        except Exception as error:  # as above
            raise CheckFailed(f"executorch failed in {self.file.name}: {error}"[:300]) from error
        for output, result in zip(outputs, results, strict=True):
            output[...] = result.numpy()

    def close(self) -> None:
        self.method = self.program = None
