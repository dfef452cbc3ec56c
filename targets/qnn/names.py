"""Names of the files of a bundle, and what tells contexts apart."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.bundle.graphs import GraphSpec
from ...runtime.quantisation import DECODERS
from ..parts import part_name

__all__ = [
    "DISTRIBUTION",
    "context_file",
    "head_digest",
    "is_on_cpu",
    "is_shared",
    "network_file",
    "program_files",
    "weights_name",
]

DISTRIBUTION = "onnxruntime-qnn"

HEAD = 4096
"""Bytes at the beginning of a context, which differ between chips and graphs."""


def is_on_cpu(component: str, options: Mapping[str, Any]) -> bool:
    """Whether the graphs of a component run on the CPU.

    Text encoders always do: UMT5 leaves the range of 16-bit numbers, which is all that the processor has.
    """
    return component == "text_encoder" or (component in DECODERS.values() and options["decoder_on"] == "cpu")


def network_file(graph: str) -> str:
    """A graph for the CPU, or one that is still to be compiled."""
    return f"{graph}.onnx"


def context_file(graph: str, chip: str) -> str:
    """The small graph of one node that refers to a compiled context."""
    return f"{graph}.{chip}.onnx"


def weights_name(program: str, graph: str, chip: str, shared: bool, part: int = 0) -> str:
    """What a context lies in: with those of the program's other graphs where weights are shared, else alone."""
    return f"{part_name(program if shared else graph, part)}.{chip}.bin"


def head_digest(file: Path) -> str:
    """SHA-256 of the beginning of a context: enough to tell it from that of another chip or graph."""
    with file.open("rb") as data:
        return hashlib.sha256(data.read(HEAD)).hexdigest()


def program_files(program: str, graphs: Sequence[GraphSpec], options: Mapping[str, Any]) -> tuple[str, ...]:
    """All files of a program that is not cut; of one that is cut, all but the contexts of its later parts."""
    if is_on_cpu(graphs[0].key.component, options):
        return tuple(network_file(spec.name) for spec in graphs)
    shared = is_shared(graphs, options)
    names = [weights_name(program, spec.name, chip, shared) for chip in options["soc"] for spec in graphs]
    names += [context_file(spec.name, chip) for chip in options["soc"] for spec in graphs]
    return tuple(dict.fromkeys(names))


def is_shared(graphs: Sequence[GraphSpec], options: Mapping[str, Any]) -> bool:
    """Whether several graphs share their weights."""
    return bool(options["share_weights"]) and len(graphs) > 1
