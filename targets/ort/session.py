"""A graph of a bundle in ONNX Runtime: weights mapped, NumPy in and out."""

import ctypes
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ...runtime.bundle.engines import EngineOptions
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import UsageError
from ...runtime.machine import usable_cores
from ..plugins import devices_of
from ..quiet import line_of
from ..sessions import Session, open_mapped
from .providers import PROVIDERS, Provider

__all__ = ["CPU_PROVIDER", "OrtEngine", "check_provider", "find_devices"]

CPU_PROVIDER = "CPUExecutionProvider"
"""The provider of the CPU, which also evaluates the operators that another provider leaves."""

RECORDS_ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""The setting by which a session knows which provider took which nodes."""

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
    if provider in PROVIDERS:
        raise UsageError(f"provider '{provider}' is chosen when a bundle is built, which keeps it: leave it out here")
    if provider and provider not in available:
        raise UsageError(f"onnxruntime has no '{provider}' here: expected one of {', '.join(available)}")


def find_devices(provider: Provider, asked: str) -> list[Any]:
    """Devices of a plug-in: those of the asked kind, or all that it finds.

    Raises:
        UsageError: it finds none here, or is not installed.
    """
    found = provider.installed_version()
    devices = devices_of(provider.wheel, provider.registration)
    kinds = [device.device.type.name for device in devices]
    if not devices:
        raise UsageError(
            f"{provider.wheel} {found} finds no device here: install the driver of its device, or build for another "
            "provider"
        )
    if asked and asked.upper() not in kinds:
        raise UsageError(f"{provider.wheel} {found} finds no device '{asked:.40}' here, but {', '.join(kinds)}")
    return [device for device, kind in zip(devices, kinds, strict=True) if asked.upper() in ("", kind)]


def _settings(options: EngineOptions, *, decodes: bool, own: bool) -> ort.SessionOptions:
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
        if decodes and own:
            # Decoders are written in fused operators: the search for others takes as long as all else of opening.
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(unwanted))
    return settings


class OrtEngine(Session):
    """One graph. Its weights stay mapped from the file, shared by graphs and processes, unless it is prepacked."""

    def __init__(
        self,
        file: Path,
        spec: GraphSpec,
        provider: Provider,
        options: EngineOptions,
        model: bytes | None = None,
    ) -> None:
        """Load a graph: that of the file, or a model whose external data lie beside it.

        Raises:
            UsageError: ONNX Runtime refuses it, or the provider finds no device here.
        """
        _give_buffers_back()
        chosen = provider.registration or options.own.get("provider")
        settings = _settings(options, decodes=bool(spec.key.decoder), own=not chosen)
        if provider.registration:
            devices = find_devices(provider, options.own.get("device", ""))
            settings.add_session_config_entry(RECORDS_ASSIGNMENT, "1")
            settings.add_provider_for_devices(devices, dict(provider.settings or {}))
            how: dict[str, Any] = {"enable_fallback": 0}
        else:
            how = {"providers": [*dict.fromkeys([options.own.get("provider") or CPU_PROVIDER, CPU_PROVIDER])]}
        try:
            session = open_mapped(file, settings, model, **how)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise UsageError(f"onnxruntime {ort.__version__} cannot load {file.name}: {line_of(error)}") from error
        super().__init__(file.name, spec, session)

    def nodes(self) -> dict[str, Counter[str]]:
        """How many nodes of each operator each provider took, of a session with a plug-in."""
        taken: dict[str, Counter[str]] = {}
        for part in self.session.get_provider_graph_assignment_info():
            taken.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        return taken
