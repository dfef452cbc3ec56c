"""What an author's folder or file holds: weights of components, however they are called, and what goes with them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...runtime.documents import Fields, read_json
from ...runtime.errors import UsageError
from ...runtime.files import is_left_behind
from ...runtime.model.checkpoint import Files
from ...runtime.model.families import TinyDecoderConfig
from ...runtime.model.families.helios import HeliosConfig
from ...runtime.model.families.wan import WanConfig
from ...runtime.model.safetensors import read_header, shards_of
from ...runtime.model.siblings import COMPONENT_FOLDERS, component_folders
from ...runtime.model.variants import STEMS, choose_weights
from ..weights.names import PREFIXES, prefix_of
from ..weights.pickled import PICKLES, is_pickle, open_tensors

__all__ = ["Part", "Parts", "find_parts", "tensor_names"]

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
NO_WEIGHTS = ("optimizer.bin", "scheduler.bin", "training_args.bin", "random_states_0.pkl")
"""What trainers leave beside weights."""

KINDS_OF = {"transformer_2": "transformer"}
"""Components whose tensors are those of another."""

MARKS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("patch_embedding.weight", "patch_embedding.0.weight"),
    "vae": ("post_quant_conv.weight", "decoder.middle.0.residual.0.gamma"),
    "text_encoder": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"),
    "tiny_decoder": (f"{TinyDecoderConfig.last_layer}.weight",),
}
"""By component: tensors, in one naming or the other, that no other component has."""

NOISE_MODELS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Folders of the networks in Wan2.2-A14B's repository, by component."""

TRANSFORMER_CLASSES = (WanConfig.class_name, HeliosConfig.class_name, "WanModel")
"""What the `config.json` beside a transformer's weights calls itself."""


@dataclass(frozen=True)
class Part:
    """A component's weights."""

    files: tuple[Path, ...]
    """One file, or all shards."""
    config: Path | None = None


@dataclass(frozen=True)
class Parts:
    """All that was found."""

    of: Mapping[str, Part]
    """By component."""
    tokenizer: Path | None = None
    """The folder of the fast tokenizer."""
    scheduler: Path | None = None
    pyramid: Path | None = None
    left_out: tuple[str, ...] = field(default=())
    """Files that are of no component."""


def find_parts(source: Path, files: Files, tokenizer: Path | None) -> Parts:
    """What a source holds, some of it from files of their own.

    Args:
        source: a diffusers folder, a folder as Wan's repositories have it, or a file of weights.
        files: weights in place of the source's, and the variant that is read.
        tokenizer: a folder in place of the source's.

    Raises:
        UsageError: it is none of these, holds a component twice, or a file is not what it is given for.
    """
    if source.is_file():
        found = _of_files([(source,)], source.parent)
    elif (source / "transformer").is_dir():
        found = _of_components(source, files.variant)
    elif all((source / name).is_dir() for name in NOISE_MODELS.values()):
        found = _of_two_networks(source, files.variant)
    elif source.is_dir():
        found = _of_repository(source, files.variant)
    else:
        raise UsageError(f"{source} does not exist: expected a folder with a model, or a file of weights")
    of = dict(found.of)
    for component in STEMS:
        single = getattr(files, component)
        if single is not None:
            of[component] = Part((_own(single, component),), of[component].config if component in of else None)
    if "transformer" not in of:
        raise UsageError(f"{source} holds no transformer: expected its weights there, or --transformer FILE")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise UsageError(f"{tokenizer} holds no tokenizer.json: expected the folder of a fast tokenizer")
    return replace(found, of=of, tokenizer=tokenizer or found.tokenizer)


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a file of weights.

    Raises:
        UsageError: it does not exist, cannot be read, or holds more than tensors.
    """
    if not file.is_file():
        raise UsageError(f"{file} does not exist: expected a file of weights")
    return list(open_tensors(file) if is_pickle(file) else read_header(file))


def _component(names: list[str]) -> str | None:
    prefix = prefix_of(names)
    bare = {name.removeprefix(prefix) for name in names}
    return next((component for component, marks in MARKS.items() if bare.intersection(marks)), None)


def _holds_several(names: list[str]) -> bool:
    """Whether a file is of several components, each with a prefix of its own."""
    return any(name.startswith(prefix) for name in names for prefix in PREFIXES) and _component(names) is None


def _own(file: Path, component: str) -> Path:
    found = _component(tensor_names(file))
    if found != KINDS_OF.get(component, component):
        raise UsageError(
            f"{file}: expected the tensors of a {component}, found those of {found or 'none that is known'}"
        )
    return file


def _of_components(source: Path, variant: str | None) -> Parts:
    """A diffusers folder, with components of siblings where its `pyramid.json` names some."""
    pyramid = source / "pyramid.json"
    described = read_json(pyramid) if pyramid.is_file() else {}
    folders = component_folders(source, Fields(described, str(pyramid)))
    of = {}
    for component, stem in STEMS.items():
        folder = folders[component]
        if folder.is_dir():
            files = _weights(folder, stem, variant)
            if not files:
                raise UsageError(
                    f"no weights in {folder}: expected {stem}.safetensors or {stem}.safetensors.index.json"
                )
            of[component] = Part(files, folder / "config.json" if (folder / "config.json").is_file() else None)
    scheduler = source / "scheduler" / "scheduler_config.json"
    return Parts(
        of,
        folders["tokenizer"] if (folders["tokenizer"] / "tokenizer.json").is_file() else None,
        scheduler if scheduler.is_file() else None,
        pyramid if pyramid.is_file() else None,
        tuple(_others(source, (*COMPONENT_FOLDERS, "scheduler", "model_index.json", "pyramid.json"))),
    )


def _others(source: Path, known: Iterable[str]) -> list[str]:
    names = sorted(path.name for path in source.iterdir())
    return [name for name in names if name not in known and not is_left_behind(name)]


def _weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """Files of the weights in a folder: safetensors, or else pickles."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = choose_weights(names, stem, variant, folder)
    if chosen is None:
        return _pickles([folder / name for name in names], variant)
    if not chosen.endswith(".json"):
        return (folder / chosen,)
    return tuple(folder / name for name in sorted(set(shards_of(folder / chosen).values())))


def _pickles(paths: Iterable[Path], variant: str | None) -> tuple[Path, ...]:
    """The one pickle among files, or its shards."""
    groups = _pickle_groups(paths)
    wanted = {stem: files for stem, files in groups.items() if stem.endswith(f".{variant}")} if variant else {}
    plain = {stem: files for stem, files in groups.items() if "." not in stem}
    found = wanted or (plain if len(groups) > 1 and len(plain) == 1 else groups)
    if len(found) > 1:
        names = ", ".join(files[0].name for files in found.values())
        raise UsageError(
            f"{next(iter(found.values()))[0].parent} holds several pickles ({names}): give one with --COMPONENT FILE"
        )
    return next(iter(found.values()), ())


def _pickle_groups(paths: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Pickles by their names without suffix, shards together."""
    groups: dict[str, tuple[Path, ...]] = {}
    for path in sorted(paths):
        if path.suffix.lower() in PICKLES and not is_left_behind(path.name) and path.name not in NO_WEIGHTS:
            stem = SHARD.sub("", path.stem)
            groups[stem] = (*groups.get(stem, ()), path)
    return groups


def _of_repository(source: Path, variant: str | None) -> Parts:
    """A folder as Wan's repositories have it: weights beside each other, the tokenizer in a folder of its own."""
    names = sorted(path.name for path in source.iterdir() if path.is_file() and not is_left_behind(path.name))
    chosen = choose_weights(names, STEMS["transformer"], variant, source)
    shards = () if chosen is None else _weights(source, STEMS["transformer"], variant)
    taken = {path.name for path in shards} | {chosen}
    groups = [shards] if shards else []
    groups += [(source / name,) for name in names if name.endswith(".safetensors") and name not in taken]
    groups += _pickle_groups(source / name for name in names if name not in taken).values()
    found = _of_files(groups, source)
    fast = sorted(source.glob("*/tokenizer.json")) + sorted(source.glob("*/*/tokenizer.json"))
    return replace(found, tokenizer=fast[0].parent if fast else None)


def _of_two_networks(source: Path, variant: str | None) -> Parts:
    """A folder as Wan2.2-A14B's repository has it: a network for high noise, and one for low."""
    found, of = _of_repository(source, variant), dict[str, Part]()
    for component, name in NOISE_MODELS.items():
        files = _weights(source / name, STEMS[component], variant)
        if not files:
            raise UsageError(f"no weights in {source / name}: expected {STEMS[component]}.safetensors or its index")
        of[component] = Part(files, _beside(source / name))
    return replace(found, of={**of, **found.of})


def _of_files(groups: Iterable[tuple[Path, ...]], beside: Path) -> Parts:
    """Components told by the names of their tensors, and the configuration beside them."""
    of, left_out = dict[str, Part](), list[str]()
    for files in groups:
        component = _component([name for file in files for name in tensor_names(file)])
        if component is None and _holds_several([name for file in files for name in tensor_names(file)]):
            raise UsageError(f"{files[0]} holds several components in one file: split it into one file for each")
        if component is None:
            left_out.append(files[0].name)
            continue
        if component in of:
            raise UsageError(
                f"{beside} holds two {component}s, {of[component].files[0].name} and {files[0].name}: "
                "give one by its own option, or keep one"
            )
        of[component] = Part(files, _beside(beside) if component == "transformer" else None)
    return Parts(of, left_out=tuple(left_out))


def _beside(folder: Path) -> Path | None:
    """The `config.json` in a folder, where it is a transformer's."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return file if read_json(file).get("_class_name") in TRANSFORMER_CLASSES else None
