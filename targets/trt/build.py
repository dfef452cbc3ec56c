"""An ONNX network to TensorRT engines: one optimisation profile per graph, checked from the build's own log."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import CheckFailed
from ..cutting import cut_network, stored_bytes
from ..digest import network_bytes, network_digest
from ..forms import Lowering, OnnxForm
from .check import BuildLog, Report, check_engine, join_reports
from .files import engine_file
from .library import import_library, listening
from .packing import pack_crossings
from .target import ENGINE_LIMIT

__all__ = ["plan_engines", "write_engines"]


def plan_engines(form: OnnxForm, options: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of weights and constants of each engine that a network will become, by the name of its file.

    Raises:
        UsageError: it cannot be cut into engines within their limit.
    """
    parts = _cut(form, options)
    return {engine_file(form.name, index): stored_bytes(part) for index, part in enumerate(parts)}


def write_engines(form: OnnxForm, folder: Path, options: Mapping[str, Any]) -> Iterator[Lowering]:
    """Build the engines of a network, one after the other, and check them.

    Args:
        form: the network.
        folder: the bundle's folder.
        options: the target's own.

    Yields:
        For each graph what the checks found.

    Raises:
        CheckFailed: the library refuses the network, or built an engine that would be slow or large.
        UsageError: the network cannot be cut into engines within their limit.
    """
    library, capabilities = options["library"], options["compute_capabilities"]
    parts = _cut(form, options)
    files = [engine_file(form.name, index) for index in range(len(parts))]
    found = [_write_engine(part, folder / file, library, capabilities) for part, file in zip(parts, files, strict=True)]
    common = {
        "library": library,
        "compute_capabilities": list(capabilities),
        "network": network_digest(form),
        "engines": len(parts),
    }
    for name, report in join_reports(found).items():
        engines = f"{len(parts)} engines, one after the other, " if len(parts) > 1 else ""
        yield Lowering(f"{name}: {engines}{report.line}", common | report.facts, files=tuple(files))


def _cut(form: OnnxForm, options: Mapping[str, Any]) -> list[OnnxForm]:
    """A network's parts, one where its weights are few."""
    limit = options["engine_limit"]
    parts = cut_network(form, int(limit), "--engine-limit") if limit else cut_network(form, ENGINE_LIMIT)
    return pack_crossings(parts, [spec.name for spec in form.graphs[0].outputs])


def _write_engine(form: OnnxForm, file: Path, library: str, capabilities: Sequence[str]) -> dict[str, Report]:
    """Build an engine, check it, and free all that its build took."""
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
    return check_engine(form, log)


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
