"""A graph of a bundle in OpenVINO itself: NumPy in and out."""

from collections.abc import Mapping
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ...runtime.bundle.engines import EngineOptions, check_inputs
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.bundle.manifest import WEIGHTS_FILE
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.machine import usable_cores
from ..links import relocated
from ..quiet import line_of

__all__ = ["ARITHMETIC", "OpenvinoEngine", "require_whole"]

ARITHMETIC = {"fp32": ("FP32", "f32"), "bf16": ("BF16", "bf16"), "fp16": ("FP16", "f16")}
"""Number types that products are computed in: the capability of a device, and the hint that asks for it."""

ENGINE = f"openvino {ov.__version__.split('-')[0]}"


@cache
def _core() -> ov.Core:
    return ov.Core()


def _device(asked: str) -> str:
    """A device that is here: what is asked for, or the CPU.

    Raises:
        UsageError: there is none of the name.
    """
    device, available = asked.upper() or "CPU", _core().available_devices
    if not any(device in (name, name.split(".")[0]) for name in available):
        raise UsageError(
            f"{ENGINE} finds no device '{asked:.40}' here, but {', '.join(available)}: install its driver, or take "
            "one of these"
        )
    return device


def _settings(device: str, options: EngineOptions) -> dict[str, Any]:
    """How a graph is compiled.

    Raises:
        UsageError: the device has no such arithmetic.
    """
    asked = options.own.get("arithmetic") or "fp32"
    capability, hint = ARITHMETIC[asked]
    has = _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    if capability not in has:
        known = ", ".join(name for name, (each, _) in ARITHMETIC.items() if each in has)
        raise UsageError(f"the {device} here has no arithmetic in {asked}: take --arithmetic {known}")
    settings: dict[str, Any] = {
        # Left alone, OpenVINO computes in 16 bits where it can, and rounds what 8-bit weights are multiplied with.
        "INFERENCE_PRECISION_HINT": hint,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # a thread that is bound to a core waits for whoever else is on it
    }
    settings |= {"INFERENCE_NUM_THREADS": options.threads or usable_cores()}
    known = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {name: value for name, value in settings.items() if name in known}


def _read(file: Path, model: bytes | None) -> ov.Model:
    """A graph, its weights mapped from the file beside it, also where these are a link, as in the hub's cache."""
    weights = file.parent / WEIGHTS_FILE
    if model is None and not weights.is_symlink():
        return _core().read_model(file)
    weights = weights.resolve()
    # OpenVINO follows no link out of a graph's folder, and that of a graph that is no file is the current one.
    with chdir(weights.parent):
        return _core().read_model(relocated(model or file.read_bytes(), {WEIGHTS_FILE: weights.name}))


def require_whole(file: Path) -> None:
    """Refuse a graph that OpenVINO does not take whole: it leaves nothing to anybody.

    Raises:
        CheckFailed: it does not know an operator.
    """
    try:
        _read(file, None)
    except Exception as error:  # OpenVINO's exceptions share no base of their own
        raise CheckFailed(f"{ENGINE} does not take {file.name}: {line_of(error)}") from error


class OpenvinoEngine:
    """One graph, compiled. Its products' weights are held in the layout that OpenVINO gives them, for each graph."""

    def __init__(self, file: Path, spec: GraphSpec, options: EngineOptions, model: bytes | None = None) -> None:
        """Load a graph: that of the file, or a model whose external data lie beside it.

        Raises:
            UsageError: OpenVINO refuses it, has no such device or arithmetic here, or it is not the graph of its
                specification.
        """
        device = _device(options.own.get("device", ""))
        settings = _settings(device, options)
        try:
            read = _read(file, model)
            compiled = _core().compile_model(read, device, settings)
        except Exception as error:  # OpenVINO's exceptions share no base of their own
            raise UsageError(f"{ENGINE} cannot load {file.name}: {line_of(error)}") from error
        self.name, self.spec = file.name, spec
        for kind, ports, specs in (("inputs", read.inputs, spec.inputs), ("outputs", read.outputs, spec.outputs)):
            found = {port.any_name: (str(port.element_type.to_dtype()), *port.shape) for port in ports}
            wanted = {each.name: (each.dtype, *each.shape) for each in specs}
            if found != wanted:
                raise UsageError(
                    f"{self.name} is not the graph of its manifest: expected {kind} {wanted}, found {found}"[:400]
                )
        self.outputs = [port.any_name for port in read.outputs]
        self.request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: OpenVINO fails in it: no memory is left, or the graph is damaged.
        """
        check_inputs(self.spec.inputs, inputs)
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            self.request.infer(arrays, share_inputs=True)
            return {name: self.request.get_tensor(name).data.copy() for name in self.outputs}
        except Exception as error:  # OpenVINO's exceptions share no base of their own
            raise CheckFailed(f"{ENGINE} failed in {self.name}: {line_of(error)}") from error

    def close(self) -> None:
        """Free the compiled graph and its weights."""
        del self.request
