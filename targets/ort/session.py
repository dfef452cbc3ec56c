"""A graph of a bundle in ONNX Runtime: weights mapped, NumPy in and out."""

import ctypes
import os
from functools import cache
from pathlib import Path

import onnxruntime as ort

from ...runtime.bundle.engines import EngineOptions
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import UsageError
from ...runtime.machine import usable_cores
from ..quiet import line_of
from ..sessions import Session, open_mapped

__all__ = ["OrtEngine", "check_provider"]

CPU = "CPUExecutionProvider"
"""The provider of the CPU, which also evaluates the operators that another provider leaves."""

MMAP_THRESHOLD = 4 * 2**20
"""Buffers from this size on are mapped, in bytes."""


@cache
def _give_buffers_back() -> None:
    """Have glibc map large buffers, in this process, unless its user chose a size.

    It would come to keep those below 32 MiB in a heap, where one small buffer that stays pins the gap of a large one:
    at 4,004 tokens and 30 blocks a run took twice what its graph needs.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
        if mallopt is not None:
            mallopt(-3, MMAP_THRESHOLD)


def check_provider(provider: str) -> None:
    """Refuse an execution provider that is not there; empty: the CPU's.

    Raises:
        UsageError: ONNX Runtime has no such provider here.
    """
    available = ort.get_available_providers()
    if provider and provider not in available:
        raise UsageError(f"onnxruntime has no '{provider}' here: expected one of {', '.join(available)}")


def _settings(options: EngineOptions, *, decodes: bool) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what it says of an error is in the exception
    settings.intra_op_num_threads = options.threads or usable_cores()
    # An arena keeps what it once took, in pieces that fit nothing else, and a memory pattern adds one block of the
    # whole peak from the second run on. Without them a run takes what `memory.peak_bytes` says, and gives it back.
    settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
    unwanted, prepack = ["FuseFp16InitializerToFp32NodeTransformer"], options.own.get("prepack", False)
    if not (prepack and decodes):
        # Folding would expand mapped 16-bit weights into private float32 ones, and a text encoder's position biases
        # into a table per layer; of a decoder it makes the sums of kernels, which are to be packed.
        unwanted.append("ConstantFolding")
    if not prepack:
        # Prepacking copies every weight into private memory, once per graph; so does a convolution's blocked layout.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        unwanted.append("NchwcTransformer")
    settings.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(unwanted))
    return settings


class OrtEngine(Session):
    """One graph. Its weights stay mapped from the file, shared by graphs and processes, unless it is prepacked."""

    def __init__(self, file: Path, spec: GraphSpec, options: EngineOptions, model: bytes | None = None) -> None:
        """Load a graph: that of the file, or a model whose external data lie beside it.

        Raises:
            UsageError: ONNX Runtime refuses it, or has no such execution provider here.
        """
        provider = options.own.get("provider", "")
        _give_buffers_back()
        check_provider(provider)
        settings = _settings(options, decodes=bool(spec.key.decoder))
        try:
            session = open_mapped(file, settings, model, providers=[*dict.fromkeys([provider or CPU, CPU])])
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise UsageError(f"onnxruntime {ort.__version__} cannot load {file.name}: {line_of(error)}") from error
        super().__init__(file.name, spec, session)
