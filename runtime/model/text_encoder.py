"""The text encoder of a checkpoint: its configuration, its tokenizer, and the names of its table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..documents import Fields, read_json
from ..errors import UsageError
from ..files import refuse_pointer
from .description import Model
from .safetensors import TensorEntry

__all__ = ["text_encoder_config", "with_table"]


def with_table(found: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """A text encoder's tensors; transformers 5 keeps the table under the name of its other owner."""
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in found:
        found["shared.weight"] = found.pop("encoder.embed_tokens.weight")
    return found


def text_encoder_config(folders: Mapping[str, Path], model: Model) -> dict[str, Any]:
    """The `config.json` of a checkpoint's text encoder, whose tokenizer is there too.

    Raises:
        UsageError: it is none, or of another width than the transformer takes.
    """
    source = folders["text_encoder"] / "config.json"
    document = read_json(source)
    fields = Fields(document, str(source))
    fields.text("model_type", choices=("umt5",))
    if fields.integer("d_model") != model.transformer.text_dim:
        raise fields.wrong("d_model", f"{model.transformer.text_dim}, the transformer's text_dim")
    _check_tokenizer(folders["tokenizer"])
    return document


def _check_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        slow = ""
        if (folder / "spiece.model").is_file():
            place = f"'{folder}'"
            slow = (
                ", found spiece.model, the slow one; transformers, with sentencepiece, makes the one of the other: "
                f"AutoTokenizer.from_pretrained({place}).save_pretrained({place})"
            )
        raise UsageError(f"{file} is missing: expected the fast tokenizer of the text encoder{slow}")
    refuse_pointer(file)
