"""A checkpoint of an author's files: linked where they can stay as they are, written where they cannot."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.documents import read_json
from ...runtime.errors import UsageError
from ...runtime.files import sync_file
from ...runtime.model.checkpoint import Checkpoint, Files, Lora, read_checkpoint, read_family
from ...runtime.model.safetensors import TensorEntry, read_header, read_tensors
from ...runtime.model.scales import fold_scales
from ...runtime.model.variants import STEMS
from ...runtime.reporter import Reporter
from ..families import modules_of
from ..weights.lora import TRANSFORMERS, merge_loras
from ..weights.names import prefix_of, to_diffusers
from ..weights.pickled import is_pickle, open_tensors
from .configs import Shapes, text_encoder_config, transformer_config, vae_config, wan_config
from .described import Description, describe, index_fields, scheduler_of
from .documents import model_index, write_json
from .extras import FIRST_FRAME, as_safetensors, first_frame_entry, with_patch_layers
from .folder import check_apart, check_new_checkpoint, new_checkpoint
from .parts import Part, Parts, find_parts
from .tensors import of_entry, of_tensor, write_index, write_tensors

__all__ = ["Assembly", "Made", "assemble"]

TEXT_LENGTH = 512
"""Tokens of a prompt, as every Wan model has them."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


SELF_DESCRIBED = ("tiny_decoder",)
"""Components that have no configuration: the shapes of their tensors say all."""


@dataclass(frozen=True)
class Assembly:
    """What a checkpoint is to be made of."""

    source: Path
    files: Files = field(default_factory=Files)
    """Weights in place of the source's."""
    tokenizer: Path | None = None
    first_frame: Mapping[str, Path] = field(default_factory=dict)
    """By transformer: a file with the vector of the first frame."""
    patch_layers: Mapping[str, Path] = field(default_factory=dict)
    """By transformer: a file with PPF's layers of each stage."""
    loras: tuple[Lora, ...] = ()
    heads: int | None = None
    """Of the transformer's attention, where no configuration says it."""
    boundary: float | None = None
    """Of two networks: the noise level, as diffusers' `boundary_ratio`, at which the second takes over."""
    description: Description = field(default_factory=Description)
    copies: bool = False
    """Files are copied, not linked."""


@dataclass(frozen=True)
class Made:
    """What was made of it."""

    checkpoint: Checkpoint
    how: Mapping[str, str]
    """Of each component: "linked", "copied" or "written"."""
    assumed: tuple[str, ...]
    missing: tuple[str, ...]
    left_out: tuple[str, ...]


def assemble(out: Path, given: Assembly, *, force: bool = False, reporter: Reporter | None = None) -> Made:
    """Make a checkpoint.

    Args:
        out: its folder.
        given: what it is made of.
        force: replace a checkpoint that is there.
        reporter: told about progress.

    Raises:
        UsageError: a file is missing, holds more than tensors, or is not of such a model; nothing is written then.
    """
    check_new_checkpoint(out, force=force)
    parts = find_parts(given.source, given.files, given.tokenizer)
    inputs = [given.source, *(file for part in parts.of.values() for file in part.files)]
    inputs += [*given.first_frame.values(), *given.patch_layers.values(), *(lora.file for lora in given.loras)]
    check_apart(out, inputs + ([] if parts.tokenizer is None else [parts.tokenizer]))
    _check_options(parts, given)
    with new_checkpoint(out) as folder:
        try:
            how, assumed, left_out = _Workshop(folder, parts, given, reporter or Reporter()).make()
            made = read_checkpoint(folder, rename=to_diffusers)
            modules_of(made.model.family).check_components(made)
        except UsageError as error:
            raise UsageError(_in_the_sources_words(str(error), folder, out, parts)) from None
    missing = [name for name in ("vae", "text_encoder") if name not in made.components]
    return Made(read_checkpoint(out, rename=to_diffusers), how, tuple(assumed), tuple(missing), tuple(left_out))


def _check_options(parts: Parts, given: Assembly) -> None:
    """Refuse options that would say nothing."""
    if given.heads is not None and parts.of["transformer"].config is not None:
        raise UsageError(f"{parts.of['transformer'].config} says how many heads there are: leave out --heads")
    if given.boundary is not None and "transformer_2" not in parts.of:
        raise UsageError("--boundary-ratio is of two transformers: give --transformer-2 too, or leave it out")
    for component in (*given.first_frame, *given.patch_layers):
        if component not in parts.of:
            raise UsageError(f"{given.source} has no {component}: nothing can be added to it")


def _in_the_sources_words(text: str, folder: Path, out: Path, parts: Parts) -> str:
    """An error about the new folder, as one about the files that it is made of."""
    for component, part in parts.of.items():
        stem, count = STEMS[component], len(part.files)
        for number, file in enumerate(part.files, 1):
            shard = f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"
            text = text.replace(str(folder / component / shard), str(file))
        text = text.replace(str(folder / component), str(part.files[0] if count == 1 else part.files[0].parent))
    for name, own in (("scheduler/scheduler_config.json", parts.scheduler), ("pyramid.json", parts.pyramid)):
        text = text if own is None else text.replace(str(folder / name), str(own))
    text = text.replace(str(folder), str(out))
    return text + (f" (left out: {', '.join(parts.left_out)})" if parts.left_out else "")


class _Workshop:
    """A checkpoint's folder while it is made."""

    def __init__(self, folder: Path, parts: Parts, given: Assembly, reporter: Reporter) -> None:
        self.folder, self.parts, self.given, self.reporter = folder, parts, given, reporter
        self.scratch = folder.parent
        self.how, self.assumed, self.left_out = dict[str, str](), list[str](), list(parts.left_out)

    def make(self) -> tuple[dict[str, str], list[str], list[str]]:
        """Write everything; how each component was placed, what was assumed, and what was left out."""
        for component, part in self.parts.of.items():
            self._place(component, part)
        self._add_extras()
        text_length = self._write_configs()
        self._write_rest(text_length)
        if self.given.loras:
            merged = merge_loras(read_checkpoint(self.folder, rename=to_diffusers), self.given.loras)
            for component in dict.fromkeys(lora.component for lora in self.given.loras):
                self._rewrite(merged.components[component], component)
        return self.how, self.assumed, self.left_out

    def _place(self, component: str, part: Part) -> None:
        """Put a component's weights into its folder: links, copies, or what a pickle holds."""
        folder, stem, count = self.folder / component, STEMS[component], len(part.files)
        folder.mkdir()
        weight_map, nbytes = dict[str, str](), 0
        for number, file in enumerate(part.files, 1):
            shard = f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"
            self.how[component] = self._bring(file, folder / shard)
            entries = read_header(folder / shard)
            if twice := sorted(entries.keys() & weight_map.keys()):
                raise UsageError(f"{file}: tensor '{twice[0]}' is also in another shard: keep one of the two")
            weight_map |= dict.fromkeys(entries, shard)
            nbytes += sum(entry.nbytes for entry in entries.values())
        if count > 1:
            write_index(folder, stem, weight_map, nbytes)

    def _bring(self, file: Path, out: Path) -> str:
        if is_pickle(file):
            tensors = {name: of_tensor(tensor) for name, tensor in open_tensors(file).items()}
            self.reporter.begin(f"tensors of {file.name}", sum(tensor.nbytes for tensor in tensors.values()))
            write_tensors(out, tensors, self.reporter.advance)
            return "written"
        if not self.given.copies:
            out.symlink_to(file.resolve())
            return "linked"
        self.reporter.begin(f"copy of {file.name}", file.stat().st_size)
        shutil.copyfile(file, out)
        sync_file(out)
        self.reporter.advance(file.stat().st_size)
        return "copied"

    def _entries(self, component: str) -> dict[str, TensorEntry]:
        """A component's tensors, by diffusers' names."""
        found = fold_scales(read_tensors(self.folder / component, STEMS[component]))
        return {new: found[name] for name, new in to_diffusers(component, list(found)).items()}

    def _shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries(component).items()}

    def _add_extras(self) -> None:
        """Add the first frame's vector as a shard beside the others, and PPF's layers by writing all anew."""
        for component, given in self.given.first_frame.items():
            self._add_first_frame(component, as_safetensors(given, self.scratch))
        for component, given in self.given.patch_layers.items():
            entries, left_out = with_patch_layers(as_safetensors(given, self.scratch), self._entries(component))
            self.left_out += [f"{name}, which {given.name} has for stage 0" for name in left_out]
            self._rewrite(entries, component)

    def _add_first_frame(self, component: str, file: Path) -> None:
        folder, stem = self.folder / component, STEMS[component]
        stored = read_tensors(folder, stem)
        width = self._shapes(component).get("patch_embedding.weight", (0,))[0]
        vector = first_frame_entry(file, width)
        name = prefix_of(list(stored)) + FIRST_FRAME
        if name in stored:
            raise UsageError(f"{self.given.source} has a {FIRST_FRAME} already: leave out {file.name}")
        files = sorted({entry.file for entry in stored.values()})
        count, weight_map = len(files) + 1, {name: f"{stem}-{len(files) + 1:05d}-of-{len(files) + 1:05d}.safetensors"}
        for number, old in enumerate(files, 1):
            shard = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            old.rename(folder / shard)
            weight_map |= {tensor: shard for tensor, entry in stored.items() if entry.file == old}
        write_tensors(folder / weight_map[name], {name: of_entry(vector)}, lambda nbytes: None)
        write_index(folder, stem, weight_map, sum(entry.nbytes for entry in (*stored.values(), vector)))

    def _rewrite(self, entries: Mapping[str, TensorEntry], component: str) -> None:
        """Write a transformer anew as one file, its edits made, in place of what is there."""
        folder, stem = self.folder / component, STEMS[component]
        tensors = {name: of_entry(entry) for name, entry in entries.items()}
        self.reporter.begin(component, sum(tensor.nbytes for tensor in tensors.values()))
        new = self.scratch / "new.safetensors"
        write_tensors(new, tensors, self.reporter.advance)
        for path in folder.iterdir():
            if path.name != "config.json":
                path.unlink()
        os.replace(new, folder / f"{stem}.safetensors")
        self.how[component] = "written"

    def _write_configs(self) -> int:
        """Write each component's configuration: the source's, or what its tensors say; the length of prompts."""
        text_length = TEXT_LENGTH
        for component, part in self.parts.of.items():
            if component in SELF_DESCRIBED:
                continue
            document = None if part.config is None else read_json(part.config)
            if document is not None and component in TRANSFORMERS and document.get("_class_name") == "WanModel":
                text_length = document.get("text_len", text_length)
                document = wan_config(document, str(part.config))
            if document is None:
                document, assumed = self._config(component, self._shapes(component), str(part.files[0]))
                self.assumed += [f"{component}: {what}" for what in assumed]
            write_json(self.folder / component / "config.json", document)
        return text_length

    def _config(self, component: str, shapes: Shapes, source: str) -> tuple[dict[str, Any], list[str]]:
        if component in TRANSFORMERS:
            return transformer_config(shapes, self.given.heads, source)
        return vae_config(shapes, source) if component == "vae" else text_encoder_config(shapes, source)

    def _write_rest(self, text_length: int) -> None:
        """The index, the scheduler, the tokenizer and `pyramid.json`."""
        tokenizer = self.parts.tokenizer
        if tokenizer is not None and "text_encoder" in self.parts.of:
            (self.folder / "tokenizer").mkdir()
            for name in TOKENIZER_FILES:
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, self.folder / "tokenizer" / name)
        shapes, two = self._shapes("transformer"), "transformer_2" in self.parts.of
        scheduler, assumed = scheduler_of(self.parts.scheduler, self.given.description.shift, two=two)
        fields, more = index_fields(self.given.source, self.folder, self.given.boundary, two=two)
        self.assumed += assumed + more
        components = [*self.parts.of, "scheduler"] + (["tokenizer"] if (self.folder / "tokenizer").is_dir() else [])
        family, _ = read_family({name: self.folder / name for name in ("transformer", "vae")})
        fields |= {"transformer": family.transformer_class, "pipeline": family.pipeline_class}
        write_json(self.folder / "model_index.json", model_index(components, scheduler["_class_name"], **fields))
        write_json(self.folder / "scheduler" / "scheduler_config.json", scheduler)
        if self.parts.pyramid is None and text_length == TEXT_LENGTH:
            self.assumed.append(f"prompts of {TEXT_LENGTH} tokens")
        described = describe(self.folder, self.parts.pyramid, self.given.description, shapes, text_length)
        write_json(self.folder / "pyramid.json", described[0])
        self.assumed += described[1]
