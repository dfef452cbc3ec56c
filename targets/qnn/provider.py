"""The execution provider: registered once in a process, its devices, and how a session asks for one chip."""

import platform
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from ...runtime.errors import UsageError
from ..plugins import devices_of, installed_version, library_module
from .chips import Chip
from .names import DISTRIBUTION

__all__ = ["check_installed", "is_emulated", "settings_for"]

PROVIDER = "QNNExecutionProvider"


def check_installed() -> str:
    """Version of the provider's wheel.

    Raises:
        UsageError: it is not installed.
    """
    return installed_version(DISTRIBUTION, "target 'qnn'", "pyrexport[qnn]")


def is_emulated() -> bool:
    """Whether the processor is emulated on the CPU, as it is on anything but Arm."""
    return platform.machine().lower() not in ("aarch64", "arm64")


def _provider() -> tuple[Sequence[Any], str]:
    """Devices of the provider, and the library of the processor's backend."""
    found = check_installed()
    devices = devices_of(DISTRIBUTION, PROVIDER)
    if not devices:
        raise UsageError(f"{DISTRIBUTION} {found} finds no processor here, and no emulation of one")
    return devices, library_module(DISTRIBUTION).get_qnn_htp_path()


def settings_for(chip: Chip, finalisation: str, shared: bool, threads: int = 0) -> ort.SessionOptions:
    """Settings of a session whose graph runs on a chip as a whole, in 16-bit floating-point numbers.

    Args:
        chip: the chip.
        finalisation: the provider's mode of graph finalisation, "0" to "3".
        shared: weights are shared with other sessions of the process.
        threads: threads of ONNX Runtime itself; 0: its own choice.
    """
    devices, backend = _provider()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what it says of an error is in the exception
    if threads:
        settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options = {
        "backend_path": backend,
        "soc_model": str(chip.soc_model),
        "htp_arch": str(chip.htp_arch),
        "enable_htp_fp16_precision": "1",
        "htp_graph_finalization_optimization_mode": finalisation,
    }
    if shared:
        options["enable_htp_weight_sharing"] = "1"
        settings.add_session_config_entry("ep.share_ep_contexts", "1")
    settings.add_provider_for_devices(devices, options)
    return settings
