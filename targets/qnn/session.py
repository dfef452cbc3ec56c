"""A graph of a bundle on the tensor processor, or in its emulation: NumPy in and out."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...runtime.bundle.engines import EngineOptions, Facts, check_inputs
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.dtypes import DTYPES
from ...runtime.errors import CheckFailed, UsageError
from .chips import CHIPS, Chip
from .names import context_file, network_file
from .provider import DISTRIBUTION, is_emulated, line_of, quiet_stdout, settings_for

__all__ = ["QnnEngine"]

COMPILED_FOR = "ep_compatibility_info.QNNExecutionProvider"
"""The entry of a context's metadata whose fifth and sixth fields are the architecture and the chip."""


@cache
def _say_emulated(chip: Chip) -> None:
    logging.getLogger("pyrexport").warning(
        "pyrexport: no Snapdragon is here: the tensor processor of %s (%s) is emulated", chip.name, chip.sold_as
    )


class QnnEngine:
    """One graph."""

    def __init__(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> None:
        """Load a graph: its context, or, where the file is a network, that network, compiled for the chip now.

        Raises:
            UsageError: the provider is missing or refuses it, it is none of the chip that is asked for, or it shares
                weights, which the emulation does not open.
        """
        self.spec = spec
        if not facts["chips"]:
            self.name = network_file(spec.name)
            settings = _cpu_settings(options.threads)
            self.session = self._load(file.parent / self.name, settings, providers=["CPUExecutionProvider"])
        else:
            chip = _chip(facts["chips"], options.own.get("chip", ""))
            if is_emulated():
                _say_emulated(chip)
            network = file.suffix == ".onnx" and file.is_file()
            self.name = file.name if network else context_file(spec.name, chip.name)
            if facts["shared"] and not network and is_emulated():
                raise UsageError(
                    f"{self.name} shares its weights with other graphs, which only a chip opens: run it on a "
                    f"{chip.sold_as}, prove it with parity --graph, or build it without --share-weights"
                )
            settings = settings_for(chip, "1", bool(facts["shared"]) and not network, options.threads)
            self.session = self._load(file.parent / self.name, settings)
            if not network:
                self._check_chip(chip)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self._check_shapes()

    def _load(self, file: Path, settings: ort.SessionOptions, **how: Any) -> ort.InferenceSession:
        try:
            with quiet_stdout():
                return ort.InferenceSession(str(file), settings, enable_fallback=0, **how)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise UsageError(f"{DISTRIBUTION} cannot load {file.name}: {line_of(error)}") from error

    def _check_chip(self, chip: Chip) -> None:
        """The provider itself runs many a context of another chip."""
        told = self.session.get_modelmeta().custom_metadata_map.get(COMPILED_FOR, "").split(":")
        if told[4:6] != [str(chip.htp_arch), str(chip.soc_model)]:
            raise UsageError(
                f"{self.name} was not compiled for {chip.name}: expected architecture {chip.htp_arch} and chip "
                f"{chip.soc_model}, found {' and '.join(told[4:6]) or 'neither'}; build the bundle again"
            )

    def _check_shapes(self) -> None:
        for kind, values, specs in (
            ("inputs", self.session.get_inputs(), self.spec.inputs),
            ("outputs", self.session.get_outputs(), self.spec.outputs),
        ):
            found = {value.name: (value.type, *value.shape) for value in values}
            wanted = {spec.name: (f"tensor({DTYPES[spec.dtype].onnx})", *spec.shape) for spec in specs}
            if found != wanted:
                raise UsageError(
                    f"{self.name} is not the graph of its manifest: expected {kind} {wanted}, found {found}"[:400]
                )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: the provider fails in it.
        """
        check_inputs(self.spec.inputs, inputs)
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            values = self.session.run(None, arrays)
        except Exception as error:  # as above
            raise CheckFailed(f"{DISTRIBUTION} failed in {self.name}: {line_of(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        """Free the session."""
        del self.session


def _cpu_settings(threads: int) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    if threads:
        settings.intra_op_num_threads = threads
    # Folding would expand mapped weights into private ones.
    settings.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings


def _chip(built: list[str], asked: str) -> Chip:
    """The chip to run: what is asked for, or the first."""
    if asked and asked not in built:
        raise UsageError(f"the bundle was not compiled for '{asked:.40}': expected one of {', '.join(built)}")
    return CHIPS[asked or built[0]]
