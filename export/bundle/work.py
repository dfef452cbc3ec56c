"""The making of a bundle in a folder beside it: weights, graphs and manifest, each kept once it is finished."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.bundle.engines import Target
from ...runtime.bundle.manifest import MANIFEST_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from ...runtime.bundle.opening import file_digest
from ...runtime.errors import CheckFailed, UsageError
from ...runtime.model.checkpoint import Checkpoint
from ...runtime.model.safetensors import read_header
from ...runtime.pipeline.text import Tokenizer
from ...runtime.reporter import Reporter
from ...targets.forms import NetworkForm, OnnxForm, TensorSpec, TorchForm
from ..families.dialects import FUSED, PORTABLE, Dialect
from ..families.layers import sources_of
from ..families.typed_dialect import TYPED
from ..lowering.memory import peak_bytes
from ..lowering.onnx import STANDARD_OPERATORS, export_onnx
from ..lowering.torch import map_weights, trace
from ..weights.stream import WeightsPlan, plan_weights, write_component
from .describe import describe_bundle
from .output import STATE_FILE, sync_file, write_synced
from .parts import Options, Part, graph_parts, table_source

__all__ = ["Work"]

LOWERING_FILE = "lowering.bin"
"""Weights that a target stores in its own programs, as long as it is at work."""


DIALECTS: Mapping[str, Dialect] = {"onnx": FUSED, "torch": PORTABLE, "network": TYPED}
"""How graphs are written for a target, by its form."""


class Work:
    """One build: its plans, and the state of its parts on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target_name: str,
        target: Target,
        partial: Path,
        options: Options,
        reporter: Reporter,
        *,
        run_graphs: bool = True,
    ) -> None:
        """Plan a build in the folder `partial`, which is there; see `build_bundle`."""
        self.checkpoint, self.target_name, self.target = checkpoint, target_name, target
        self.partial, self.options, self.reporter, self.run_graphs = partial, options, reporter, run_graphs
        symbolic = target.GROUPING == "profiles"
        self.parts = list(graph_parts(checkpoint, options, DIALECTS[target.FORM], symbolic=symbolic))
        self.table = table_source(checkpoint, options.text_storage)
        table = [self.table] if self.table else []
        graphs = [source for part in self.parts for source in sources_of(part.module).values()]
        if target.FORM != "onnx":
            self.plans = {LOWERING_FILE: plan_weights(graphs)} | ({WEIGHTS_FILE: plan_weights(table)} if table else {})
        else:
            self.plans = {WEIGHTS_FILE: plan_weights([*graphs, *table])}
        self.state = self._read_state()
        self.kept: set[str] = set()
        self.identities = {
            component: _fingerprint(_identities(checkpoint, component)) for component in checkpoint.components
        }
        self.tokenizer = b""
        if checkpoint.text_encoder:
            self.tokenizer = (checkpoint.folder / "tokenizer" / "tokenizer.json").read_bytes()
        _check_headers(checkpoint)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(plan.nbytes for plan in self.plans.values())

    def run(self) -> dict[str, Any]:
        """Make what is missing, and describe all of it."""
        programs = group_parts(self.parts, self.target.GROUPING)
        files = {f"{name}{self.target.SUFFIX}" for name in programs}
        wanted = {MANIFEST_FILE, STATE_FILE, TOKENIZER_FILE, *self.plans, *files}
        for stale in self.partial.iterdir():
            if stale.name not in wanted:
                stale.unlink() if stale.is_file() or stale.is_symlink() else shutil.rmtree(stale)
        if self.checkpoint.text_encoder:
            write_synced(self.partial / TOKENIZER_FILE, self.tokenizer)
            Tokenizer(self.partial / TOKENIZER_FILE, self.checkpoint.model.text_length)
        self._check_layout()
        self.kept = {name for name in programs if self._is_kept(name)}
        lowers = len(self.kept) < len(programs)
        self._make_room(lowers)
        for file, plan in self.plans.items():
            if lowers or file == WEIGHTS_FILE:  # programs that are all there need no weights of the build's own
                self._weights(file, plan)
        graphs: dict[str, Any] = {}
        for name, parts in programs.items():
            graphs |= self._program(name, parts)
        (self.partial / LOWERING_FILE).unlink(missing_ok=True)
        return self._describe(graphs)

    def networks(self) -> Iterator[NetworkForm]:
        """The networks alone, with their weights, of a target that takes networks."""
        self._check_layout()
        self._make_room(lowers=True)
        self._weights(LOWERING_FILE, self.plans[LOWERING_FILE])
        for name, parts in group_parts(self.parts, self.target.GROUPING).items():
            self.reporter.part(f"graph {name}", 1)
            yield self._network_form(name, parts)
            self.reporter.advance(1)

    def _check_layout(self) -> None:
        """Begin anew where the weights are laid out in another way."""
        layout = _fingerprint(f"{file} {line}" for file, plan in self.plans.items() for line in plan.lines())
        if self.state.get("layout") != layout:
            self.state = {"layout": layout}
            self._write_state()

    def _make_room(self, lowers: bool) -> None:
        """Refuse a disk that is too small for the weights files and for the programs that hold weights themselves."""
        files = {file: plan.nbytes for file, plan in self.plans.items() if lowers or file == WEIGHTS_FILE}
        held = sum((self.partial / file).stat().st_blocks * 512 for file in files if (self.partial / file).is_file())
        needed = sum(files.values()) + files.get(LOWERING_FILE, 0)
        free = shutil.disk_usage(self.partial).free
        if free + held < needed:
            raise CheckFailed(
                f"{self.partial}: expected room for {needed:,} bytes of weights, found {free + held:,} bytes free"
            )
        for file, nbytes in files.items():
            if not _has_size(self.partial / file, nbytes):
                with (self.partial / file).open("wb") as out:
                    out.truncate(nbytes)

    def _weights(self, name: str, plan: WeightsPlan) -> None:
        file = self.partial / name
        for component in dict.fromkeys(source.component for source in plan.places):
            key = f"weights of {component}" + (" table" if name == WEIGHTS_FILE and len(self.plans) > 1 else "")
            inputs, before = self.identities[component], self.state.get(key, {})
            if before.get("inputs") == inputs and before.get("sha256") == _region(file, plan, component):
                self.reporter.kept(key)
                continue
            self._require_unchanged(component)
            total = sum(place.nbytes for place in plan.component(component).values())
            self.reporter.part(key, total)
            write_component(self.checkpoint, plan, component, file, self.reporter.advance)
            self._finish(key, {"inputs": inputs, "sha256": _region(file, plan, component)})

    def _require_unchanged(self, component: str) -> None:
        if _fingerprint(_identities(self.checkpoint, component)) != self.identities[component]:
            raise UsageError(f"{self.checkpoint.folder / component} was changed during the build: run it again")

    def _program(self, name: str, parts: Sequence[Part]) -> dict[str, Any]:
        """A file with one graph or several, and the manifest's entries of them."""
        key, file = f"graph {name}", self.partial / f"{name}{self.target.SUFFIX}"
        if name in self.kept:
            self.reporter.kept(key)
            entry = self.state[key]
        else:
            graphs = self._write_program(key, name, parts)
            entry = {"inputs": self._inputs(), "graphs": graphs, "sha256": file_digest(file)}
            self._finish(key, entry)
        for graph, description in entry["graphs"].items():
            if self.run_graphs and description["memory"] is None:
                self.reporter.part(f"run of {graph}", 1)
                description["memory"] = self.target.try_graph(file, graph, description)
                self.reporter.advance(1)
                self._finish(key, entry)
        return dict(entry["graphs"])

    def _is_kept(self, name: str) -> bool:
        """Whether a program of an interrupted build is there and of the same inputs."""
        entry: dict[str, Any] = self.state.get(f"graph {name}", {})
        file = self.partial / f"{name}{self.target.SUFFIX}"
        return entry.get("inputs") == self._inputs() and _is_whole(file, entry["sha256"])

    def _inputs(self) -> str:
        """What every program depends on."""
        lines = [
            version("pyrexport"), version("torch"), *self.target.engine(), self.target_name, repr(self.options),
            self.state["layout"], json.dumps(self.checkpoint.model.to_json()), repr(self.checkpoint.config),
            json.dumps(self.checkpoint.text_encoder_config, sort_keys=True, default=str),
            json.dumps(self.checkpoint.vae_config, sort_keys=True, default=str),
            version("onnxscript"),
            *(self.identities.values() if self.target.FORM != "onnx" else ()),  # programs hold their weights themselves
        ]  # fmt: skip
        return _fingerprint(lines)

    def _write_program(self, key: str, name: str, parts: Sequence[Part]) -> dict[str, Any]:
        self.reporter.part(key, len(parts))
        file, graphs = f"{name}{self.target.SUFFIX}", {}
        if self.target.FORM == "network":
            network = self._network_form(name, parts)
            forms: list[Any] = [network]
            shapes = [(part.name, None, part.inputs, network.outputs[part.name]) for part in parts]
        else:
            forms = [self._torch_form(part) if self.target.FORM == "torch" else self._onnx_form(part) for part in parts]
            shapes = [(form.name, form.memory, form.inputs, form.outputs) for form in forms]
        found = self.target.write_program(name, forms, self.partial)
        for (graph, memory, inputs, outputs), lowering in zip(shapes, found, strict=True):
            if lowering.line:
                self.reporter.said(lowering.line)
            graphs[graph] = {"file": file, "memory": memory, "facts": dict(lowering.facts)} | {
                kind: {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype} for spec in values}
                for kind, values in (("inputs", inputs), ("outputs", outputs))
            }
            self.reporter.advance(1)
        sync_file(self.partial / file)
        return graphs

    def _network_form(self, name: str, parts: Sequence[Part]) -> NetworkForm:
        """The network that the parts of a program share."""
        part = parts[0]
        exported = export_onnx(
            part.module,
            part.inputs,
            part.outputs,
            name,
            operators=STANDARD_OPERATORS,
            symbols=part.symbols,
            layers=part.layers,
        )
        places = self.plans[LOWERING_FILE].places
        placements = {weight: places[source] for weight, source in exported.sources.items()}
        outputs = {part.name: _outputs(exported.model, part.inputs) for part in parts}
        return NetworkForm(
            name, exported.model, placements, self.partial / LOWERING_FILE, {part.name: part.inputs for part in parts},
            outputs, self.options.compute_capabilities,
        )  # fmt: skip

    def _onnx_form(self, part: Part) -> OnnxForm:
        exported = export_onnx(part.module, part.inputs, part.outputs, part.name, layers=part.layers)
        placements = {name: self.plans[WEIGHTS_FILE].places[source] for name, source in exported.sources.items()}
        outputs = tuple(_spec(value) for value in exported.model.graph.outputs)
        return OnnxForm(part.name, exported.model, placements, part.inputs, outputs, peak_bytes(exported.model))

    def _torch_form(self, part: Part) -> TorchForm:
        sources, places = sources_of(part.module), self.plans[LOWERING_FILE].places
        file = self.partial / LOWERING_FILE
        program = trace(part.module, part.inputs)
        map_weights(program, sources, places, file)
        outputs = tuple(
            TensorSpec(name, tuple(node.meta["val"].shape), str(node.meta["val"].dtype).removeprefix("torch."))
            for name, node in zip(part.outputs, program.graph.output_node().args[0], strict=True)
        )
        placements = {name: places[source] for name, source in sources.items()}
        return TorchForm(part.name, program, placements, file, part.inputs, outputs)

    def _describe(self, graphs: Mapping[str, Any]) -> dict[str, Any]:
        for component in self.checkpoint.components:
            self._require_unchanged(component)
        names = [*dict.fromkeys(graph["file"] for graph in graphs.values())]
        names += [WEIGHTS_FILE] if WEIGHTS_FILE in self.plans else []
        names += [TOKENIZER_FILE] if self.checkpoint.text_encoder else []
        files = {}
        for name in names:
            path = self.partial / name
            self.reporter.part(f"hash of {name}", path.stat().st_size)
            files[name] = {"sha256": file_digest(path, self.reporter.advance), "bytes": path.stat().st_size}
        engine = dict(zip(("name", "version"), self.target.engine(), strict=True))
        table = None if self.table is None else self.plans[WEIGHTS_FILE].places[self.table]
        weight_bytes = sum(plan.weight_bytes for plan in self.plans.values())
        return describe_bundle(
            self.checkpoint, self.options, self.target_name, engine,
            compute=self.options.precision if self.target.FORM == "network" else "fp32",
            graphs=graphs, table=table, weight_bytes=weight_bytes, files=files,
        )  # fmt: skip

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.partial / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(state, dict):
            return {}
        fields: dict[str, set[str]] = {"weights": {"inputs", "sha256"}, "graph": {"inputs", "sha256", "graphs"}}
        return {
            key: value for key, value in state.items()
            if key == "layout" or (isinstance(value, dict) and value.keys() == fields.get(key.partition(" ")[0]))
        }  # fmt: skip

    def _write_state(self) -> None:
        write_synced(self.partial / STATE_FILE, json.dumps(self.state).encode())

    def _finish(self, key: str, value: Any) -> None:
        self.state[key] = value
        self._write_state()


def group_parts(parts: Sequence[Part], grouping: str) -> dict[str, list[Part]]:
    """The programs that graphs are written into, by name; see `Target.GROUPING`."""
    programs: dict[str, list[Part]] = {}
    for part in parts:
        kind = "stages" if part.name.startswith("stage") else part.name.partition("_")[0]
        programs.setdefault(part.name if grouping == "none" else kind, []).append(part)
    if grouping == "profiles":
        for name, group in list(programs.items()):
            if any(part.module is not group[0].module for part in group):
                del programs[name]
                programs |= {part.name: [part] for part in group}
    return programs


def _outputs(model: ir.Model, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Outputs of a network whose symbolic axes are those of the given inputs."""
    sizes = {
        str(axis): size
        for value, spec in zip(model.graph.inputs, inputs, strict=True)
        for axis, size in zip(value.shape or (), spec.shape, strict=True)
    }
    return tuple(
        TensorSpec(str(value.name), tuple(sizes[str(axis)] if str(axis) in sizes else int(str(axis)) for axis in value.shape or ()),
                   str(value.dtype.numpy()) if value.dtype else "")
        for value in model.graph.outputs
    )  # fmt: skip


def _region(file: Path, plan: WeightsPlan, component: str) -> str:
    """SHA-256 of a component's part of a weights file."""
    places = plan.component(component).values()
    first, last = min(place.offset for place in places), max(place.offset + place.nbytes for place in places)
    return file_digest(file, start=first, end=last)


def _has_size(file: Path, nbytes: int) -> bool:
    return file.is_file() and file.stat().st_size == nbytes


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    return TensorSpec(value.name, tuple(int(n) for n in value.shape.numpy()), str(value.dtype.numpy()))


def _identities(checkpoint: Checkpoint, component: str) -> list[str]:
    """What tells one version of a component's files from another without reading them."""
    files = sorted({entry.file for entry in checkpoint.components[component].values()})
    lines = []
    for file in files:
        status = file.stat()
        lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    return lines


def _check_headers(checkpoint: Checkpoint) -> None:
    """Refuse files that were replaced since their headers were read: what is read next would be elsewhere in them."""
    entries = [entry for tensors in checkpoint.components.values() for entry in tensors.values()]
    headers = {file: read_header(file) for file in dict.fromkeys(entry.file for entry in entries)}
    for entry in entries:
        if headers[entry.file].get(entry.name) != entry:
            raise UsageError(f"{entry.file} was changed since it was opened: run the build again")


def _fingerprint(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_whole(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256
