"""An ONNX network to a TensorRT engine: one optimisation profile per graph, checked from the build's own log."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import CheckFailed
from ..digest import network_bytes, network_digest
from ..forms import Lowering, OnnxForm
from .check import BuildLog, check_engine
from .library import import_library, listening

__all__ = ["write_engine"]


def write_engine(form: OnnxForm, file: Path, library: str, capabilities: Sequence[str]) -> Iterator[Lowering]:
    """Build an engine and check it.

    Args:
        form: the network.
        file: the engine's file.
        library: the distribution that builds it.
        capabilities: compute capabilities of the GPUs to build for, such as "8.9".

    Yields:
        For each graph what the check found.

    Raises:
        CheckFailed: the library refuses the network, or built an engine that would be slow or large.
    """
    trt = import_library(library)
    log = BuildLog()
    with listening(trt, lambda severity, message: _take(trt, log, severity, message)) as logger:
        weights = np.memmap(form.weights, np.uint8, "c") if form.placements else np.zeros(1, np.uint8)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        _parse(parser, form, weights, log)
        config = _configure(trt, builder, form)
        if library == "tensorrt-rtx":  # TensorRT builds for the GPU that is here
            _set_capabilities(trt, config, capabilities)
        _serialize(trt, builder, network, config, file, log)
    network = network_digest(form)
    common = {"library": library, "compute_capabilities": list(capabilities), "network": network}
    for name, report in check_engine(form, log).items():
        yield Lowering(f"{name}: {report.line}", common | report.facts)


def _parse(parser: Any, form: OnnxForm, weights: Any, log: BuildLog) -> None:
    """Hand the parser the network and pointers to the mapped weights, so that it holds no copy of them."""
    done = parser.load_model_proto(network_bytes(form))
    for name, place in form.placements.items():
        done = done and parser.load_initializer(name, weights.ctypes.data + place.offset, place.nbytes)
    if not (done and parser.parse_model_proto()):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise CheckFailed(f"TensorRT refuses the network of {form.name}: {' '.join((errors or log.errors)[:1])}"[:400])


def _configure(trt: Any, builder: Any, form: OnnxForm) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for where 10 bits are not enough
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for graph in form.graphs:
        profile = builder.create_optimization_profile()
        for spec in graph.inputs:
            profile.set_shape(spec.name, spec.shape, spec.shape, spec.shape)
        config.add_optimization_profile(profile)
    return config


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        known = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
        if not config.set_compute_capability(known, index):
            raise CheckFailed(
                f"tensorrt-rtx {trt.__version__} refuses compute capability {capability} in this combination"
            )


def _serialize(trt: Any, builder: Any, network: Any, config: Any, file: Path, log: BuildLog) -> None:
    """Write the engine as it is serialised, without holding it twice where the library can."""
    with file.open("wb") as out:
        if hasattr(builder, "build_serialized_network_to_stream"):
            errors: list[OSError] = []

            class Writer(trt.IStreamWriter):  # type: ignore[misc]
                def __init__(self) -> None:
                    trt.IStreamWriter.__init__(self)

                def write(self, data: bytes) -> int:
                    try:
                        return 0 if errors else out.write(data)
                    except OSError as error:  # TensorRT would swallow it, and go on
                        errors.append(error)
                        return 0

            done = builder.build_serialized_network_to_stream(network, config, Writer())
            if errors:
                raise errors[0]
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            if done:
                out.write(memoryview(plan))
    if not done:
        raise CheckFailed(f"TensorRT builds no engine of {file.stem}: {' '.join(log.errors[-2:])}"[:400])


def _take(trt: Any, log: BuildLog, severity: Any, message: str) -> None:
    if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
        log.errors.append(" ".join(message.split()))
    else:
        log.read(message)
