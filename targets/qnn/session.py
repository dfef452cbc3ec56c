"""A graph of a bundle on the tensor processor, or in its emulation: NumPy in and out."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ...runtime.bundle.engines import EngineOptions, Facts
from ...runtime.bundle.graphs import GraphSpec
from ...runtime.errors import UsageError
from ...runtime.machine import usable_cores
from ..quiet import line_of, silenced
from ..sessions import Session, open_mapped
from .chips import Chip, find_chips
from .names import DISTRIBUTION, context_file, head_digest, network_file, weights_name
from .provider import is_emulated, settings_for

__all__ = ["QnnEngine"]

COMPILED_FOR = "ep_compatibility_info.QNNExecutionProvider"
"""The entry of a context's metadata whose fifth and sixth fields are the architecture and the chip."""


@cache
def _say_emulated(chip: Chip) -> None:
    logging.getLogger("pyrexport").warning(
        "pyrexport: no Snapdragon is here: the tensor processor of %s (%s) is emulated", chip.name, chip.sold_as
    )


class QnnEngine(Session):
    """One graph."""

    engine = DISTRIBUTION

    def __init__(self, file: Path, spec: GraphSpec, facts: Facts, options: EngineOptions) -> None:
        """Load a graph: its context, or, where the file is a network, that network, compiled for the chip now.

        Raises:
            UsageError: the provider is missing or refuses it, it is none of the chip that is asked for, or it shares
                weights, which the emulation does not open.
        """
        network = file.parent / network_file(spec.name)
        if not facts["chips"]:
            opened = _load(network, _cpu_settings(options.threads), providers=["CPUExecutionProvider"])
            super().__init__(network.name, spec, opened)
            self.engine = Session.engine
            return
        chip = _chip(facts["chips"], options.own.get("chip", ""))
        if is_emulated():
            _say_emulated(chip)
        if file == network:
            settings = settings_for(chip, facts["finalisation"], False, options.threads)
            super().__init__(file.name, spec, _load(file, settings))
            return
        context = file.parent / context_file(spec.name, chip.name)
        if facts["shared"] and is_emulated():
            raise UsageError(
                f"{context.name} shares its weights with other graphs, which only a chip opens: run it on a "
                f"{chip.sold_as}, prove it with parity --graph, or build it without --share-weights"
            )
        _check_head(file.parent, spec, facts, chip)
        opened = _load(context, settings_for(chip, facts["finalisation"], bool(facts["shared"]), options.threads))
        _check_chip(context.name, opened, chip)
        super().__init__(context.name, spec, opened)


def _load(file: Path, settings: ort.SessionOptions, **how: Any) -> ort.InferenceSession:
    try:
        with silenced(1):
            return open_mapped(file, settings, enable_fallback=0, **how)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        cure = "fetch or build the bundle again"
        raise UsageError(f"{DISTRIBUTION} cannot load {file.name}: {line_of(error)}; {cure}") from error


def _check_head(folder: Path, spec: GraphSpec, facts: Facts, chip: Chip) -> None:
    """The provider opens contexts of other chips and graphs, and fails in a run at best."""
    for part, expected in enumerate(facts["heads"][chip.name]):
        name = weights_name(spec.key.program, spec.name, chip.name, bool(facts["shared"]), part)
        found = head_digest(folder / name)
        if found != expected:
            raise UsageError(
                f"{name} is not the context of {spec.name} for {chip.name}: expected one that begins with SHA-256 "
                f"{expected[:16]}…, found {found[:16]}…; fetch or build the bundle again"
            )


def _check_chip(name: str, session: ort.InferenceSession, chip: Chip) -> None:
    """The provider itself runs many a context of another chip."""
    told = session.get_modelmeta().custom_metadata_map.get(COMPILED_FOR, "").split(":")
    if told[4:6] != [str(chip.htp_arch), str(chip.soc_model)]:
        raise UsageError(
            f"{name} was not compiled for {chip.name}: expected architecture {chip.htp_arch} and chip "
            f"{chip.soc_model}, found {' and '.join(told[4:6]) or 'neither'}; build the bundle again"
        )


def _cpu_settings(threads: int) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads or usable_cores()
    # Folding would expand mapped weights into private ones.
    settings.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings


def _chip(built: list[str], asked: str) -> Chip:
    """The chip to run: what is asked for, or the first."""
    (chip,) = find_chips([asked or built[0]])[:1]
    if chip.name not in built:
        raise UsageError(f"the bundle was not compiled for '{asked:.40}': expected one of {', '.join(built)}")
    return chip
