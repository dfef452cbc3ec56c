"""What of a build is finished: kept beside its files, so that a rerun goes on where an interruption stopped it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError
from ...runtime.files import file_digest, write_whole
from ...runtime.model.safetensors import TensorEntry
from ..weights.pickled import read_any_header
from .blueprint import Blueprint
from .output import STATE_FILE

__all__ = ["Identities", "Journal", "fingerprint", "program_digest"]

PACKAGES = ("pyrexport", "torch", "onnxscript")
"""Packages whose versions decide what a graph becomes."""

FIELDS = {"weights": {"inputs", "sha256"}, "program": {"inputs", "sha256", "graphs", "files"}}
"""Fields of each kind of entry: what it was made from, what it became, and of a program what was found out about its
graphs, and the names of its files."""


def fingerprint(lines: Iterable[str]) -> str:
    """SHA-256 of some lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def program_digest(files: Sequence[Path]) -> str:
    """What tells the files of a program from others."""
    return fingerprint(file_digest(file) for file in files)


class Identities:
    """Which version of each component's files a build began with."""

    def __init__(self, tensors: Mapping[str, Mapping[str, TensorEntry]]) -> None:
        """Take down the files as they are.

        Raises:
            UsageError: a file was replaced since its header was read.
        """
        self.tensors = tensors
        self.of = {component: self._find(component) for component in tensors}
        self._check_headers()

    def require_unchanged(self, component: str) -> None:
        """Refuse files that are others by now.

        Raises:
            UsageError: they are.
        """
        if self._find(component) != self.of[component]:
            folder = next(iter(self.tensors[component].values())).file.parent
            raise UsageError(f"{folder} was changed during the build: run it again")

    def _find(self, component: str) -> str:
        """What tells one version of a component's files from another without reading them."""
        tensors = self.tensors[component]
        lines = [f"{name} {entry.edits}" for name, entry in tensors.items() if entry.edits]
        for file in sorted(frozenset[Path]().union(*(entry.files for entry in tensors.values()))):
            status = file.stat()
            lines.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
        return fingerprint(lines)

    def _check_headers(self) -> None:
        """What is read next would be elsewhere in a file that was replaced."""
        edited = [entry for tensors in self.tensors.values() for entry in tensors.values()]
        entries = [replace(entry, edits=()) for entry in edited]
        entries += [tensor for entry in edited for edit in entry.edits for tensor in edit.tensors]
        headers = {file: read_any_header(file) for file in dict.fromkeys(entry.file for entry in entries)}
        for entry in entries:
            found = headers[entry.file].get(entry.name)
            if found is None or entry not in (found, found.last_rows(*entry.shape[:1])):
                raise UsageError(f"{entry.file} was changed since it was opened: run the build again")


class Journal:
    """The entries of a build's folder."""

    def __init__(self, folder: Path, blueprint: Blueprint) -> None:
        """Read what an interrupted build left, if its weights lie where this one's will."""
        self.file = folder / STATE_FILE
        self.identities = Identities(blueprint.tensors)
        self.placed = fingerprint(f"{f} {line}" for f, places in blueprint.files.items() for line in places.lines())
        self.inputs = self._inputs(blueprint)
        self.entries = self._read()
        if self.entries.get("placed") != self.placed:
            self.entries = {"placed": self.placed}
            self._save()

    def _inputs(self, blueprint: Blueprint) -> str:
        """What every program depends on."""
        checkpoint, target = blueprint.checkpoint, blueprint.target
        documents = (
            checkpoint.model.to_json(),
            checkpoint.model.transformer.to_json(),
            checkpoint.text_encoder_config,
            checkpoint.vae_config,
        )
        return fingerprint(
            [
                *(version(package) for package in PACKAGES),
                *target.engine_of(blueprint.options.target),
                target.name,
                repr(blueprint.options),
                self.placed,
                *(json.dumps(document, sort_keys=True, default=str) for document in documents),
                *(self.identities.of.values() if target.holds_weights else ()),
            ]
        )

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(entries, dict):
            return {}
        return {
            key: value
            for key, value in entries.items()
            if key == "placed" or (isinstance(value, dict) and value.keys() == FIELDS.get(key.partition(" ")[0]))
        }

    def _save(self) -> None:
        write_whole(self.file, json.dumps(self.entries).encode())

    def get(self, key: str) -> dict[str, Any]:
        """An entry; empty where there is none."""
        entry: dict[str, Any] = self.entries.get(key, {})
        return entry

    def finish(self, key: str, entry: dict[str, Any]) -> None:
        """Keep an entry."""
        self.entries[key] = entry
        self._save()

    def files_of(self, program: str) -> list[str]:
        """Names of a finished program's files; none where it is not finished."""
        files: list[str] = self.get(f"program {program}").get("files", [])
        return files

    def keeps_program(self, name: str) -> bool:
        """Whether a program of an interrupted build is there whole, and of the same inputs."""
        entry, files = self.get(f"program {name}"), [self.file.with_name(file) for file in self.files_of(name)]
        there = entry.get("inputs") == self.inputs and all(file.is_file() for file in files)
        return there and program_digest(files) == entry["sha256"]
