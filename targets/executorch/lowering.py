"""Lowering in bounded memory: ExecuTorch's own passes, with the weights left in the file that they are mapped from.

By itself a lowering copies every weight several times over (3.9 times for one method, 8.7 for three): each pass
copies the program with its tensors, and XNNPACK's part is collected in memory before it is written.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.traceback import NodeSource
from torch.utils._pytree import tree_unflatten

from ...runtime.files import file_digest
from ..forms import Placement
from ..tracing import lean_tracing
from .dialect import FOLDED
from .folding import fold

__all__ = ["Region", "lower", "merge", "weights_stay_in_file"]


class Region(FileBackedData):
    """Part of a file, as ExecuTorch writes data that is not in memory."""

    def __init__(self, file: Path, place: Placement, sha256: str) -> None:
        """A weight in a file, and its hash."""
        self.key = sha256
        self._file, self._start, self._size, self._sha256 = file, place.offset, place.nbytes, bytes.fromhex(sha256)

    def _read(self, size: int) -> bytes:
        with self._file.open("rb") as data:
            data.seek(self._start)
            return data.read(min(size, self._size))

    def prefix(self, size: int) -> bytes:
        """Its first bytes."""
        return self._read(size)

    def to_bytes(self) -> bytes:
        """All of it."""
        return self._read(self._size)

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        """Copy it, a piece at a time."""
        with self._file.open("rb") as data:
            data.seek(self._start)
            left = self._size
            while left:
                piece = data.read(min(left, 8 * 1024 * 1024))
                if not piece:
                    raise OSError(f"{self._file} was cut while it was read")
                outfile.write(piece)
                left -= len(piece)


class _Store(NamedDataStore):
    """Constants that lie in the weights file stay there; others, such as kernels in XNNPACK's layout, are kept."""

    regions: Mapping[str, Region] = {}

    def add_named_data(self, key: str, data: Any, *args: Any, **kwargs: Any) -> None:
        super().add_named_data(key, self.regions.get(key[-64:], data), *args, **kwargs)


@contextlib.contextmanager
def weights_stay_in_file(
    file: Path, places: Iterable[Placement], mapped: Iterable[torch.Tensor]
) -> Iterator[Mapping[int, Region]]:
    """While ExecuTorch lowers programs, don't copy tensors that are mapped from a file.

    Args:
        file: the file of the weights.
        places: where they lie in it.
        mapped: tensors that are mapped from it.

    Yields:
        What is written of each weight, by its offset in the file.
    """
    regions, found = {}, {}
    for place in places:
        sha256 = file_digest(file, start=place.offset, end=place.offset + place.nbytes)
        regions[sha256] = found[place.offset] = Region(file, place, sha256)  # a constant's name ends in this hash
    addresses = {tensor.data_ptr() for tensor in mapped}
    store = type("_FileStore", (_Store,), {"regions": regions})
    with contextlib.ExitStack() as undo:
        for kind in (torch.Tensor, torch.nn.Parameter):
            undo.enter_context(_replaced(kind, "__deepcopy__", _copying_all_but(addresses, kind.__deepcopy__)))
        undo.enter_context(_replaced(xnnpack_preprocess, "NamedDataStore", store))
        # The provenance of every node is copied in every pass, and grows with each: a fifth of the time.
        undo.enter_context(_replaced(NodeSource, "__deepcopy__", lambda source, memo: source))
        # What is lowered stays as it is, but its graph would be copied with each program that holds it.
        undo.enter_context(_replaced(LoweredBackendModule, "__deepcopy__", lambda module, memo: module))
        undo.enter_context(lean_tracing())
        yield found


def _copying_all_but(addresses: set[int], copy: Any) -> Any:
    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        real = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        return tensor if real and tensor.data_ptr() in addresses else copy(tensor, memo)

    return deepcopy


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    there, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


class _WholePartitioner(XnnpackPartitioner):
    """Delegates a method as a whole where XNNPACK has all of it.

    The general search keeps, for each node, the set of all nodes after it: over 20 GB for the 16,000 nodes of a
    stage 0.
    """

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        taken = {node for group in self.get_matched_nodes_from_configs(ep) for node in group}
        left = [node for node in ep.graph.nodes if node.op == "call_function" and node not in taken]
        if not taken or any(node.all_input_nodes for node in left):
            searched: list[Partition] = super().generate_partitions(ep)
            return searched
        return [Partition(id=0, nodes=taken)]  # what is left takes nothing, so that no cycle can arise


def lower(name: str, program: ExportedProgram, kept: Sequence[Any] = ()) -> ExportedProgram:
    """Lower one method to XNNPACK, but for operators that are kept."""
    fold(program, FOLDED)
    for node in program.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    config = EdgeCompileConfig(_core_aten_ops_exception_list=list(kept))
    edge = to_edge_transform_and_lower(
        {name: program}, partitioner={name: [_WholePartitioner()]}, compile_config=config
    )
    lowered: ExportedProgram = edge.exported_program(name)
    for module in lowered.graph_module.modules():
        if isinstance(module, LoweredBackendModule):
            _outputs_are_known(module.original_module)
    return lowered


def _outputs_are_known(program: ExportedProgram) -> None:
    """Let passes that come to a delegate take its outputs' shapes as they are: each would run all that it holds."""
    (output,) = program.graph.find_nodes(op="output")
    values = [node.meta["val"] for node in output.args[0]]

    def outputs(*_: Any) -> Any:
        flat = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype) for each in values]
        return tree_unflatten(flat, program.call_spec.out_spec)

    vars(program)["module"] = lambda: outputs


def merge(methods: Mapping[str, ExportedProgram]) -> EdgeProgramManager:
    """Lowered methods as one program, in which equal constants are one."""
    return EdgeProgramManager(dict(methods))
