"""Prompts as diffusers' WanPipeline handles them: cleaned, tokenised, cut to the text length."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UsageError

__all__ = ["UNUSED_NEGATIVE", "Tokenizer", "Tokens", "check_cleaning", "clean_prompt", "prompt_warnings"]

UNKNOWN = "<unk>"
"""What SentencePiece, whose tokenizers the families have, calls a piece that it does not know."""
UNUSED_NEGATIVE = "the negative prompt is not used without guidance: give a guidance scale above 1, or leave it out"
MOST = 5
"""Unknown pieces that a warning names."""


def clean_prompt(prompt: str) -> str:
    """Mend the encoding with ftfy, unescape HTML twice, collapse white space.

    Without ftfy diffusers mends nothing, and the model is given other tokens: ’ and “ stay what they are. So ftfy is
    needed here, wherever prompts are cleaned, and never a matter of what happens to be installed.
    """
    import ftfy

    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", prompt).strip()


def check_cleaning(built: str) -> None:
    """Refuse to clean prompts with another major version of ftfy than the one that a bundle was built with.

    Raises:
        UsageError: it is another one, or none; the message begins with "built with".
    """
    major = built.split(".")[0]
    try:
        found = f"ftfy {version('ftfy')}"
    except PackageNotFoundError:
        found = "none"
    if found.split(".")[0] != f"ftfy {major}":
        raise UsageError(
            f"built with prompts cleaned by ftfy {built}, found {found}, which may give other tokens: "
            f"pip install 'ftfy=={major}.*'"
        )


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder is given it, and what it is not given."""

    ids: list[int]
    """With the end token, without padding."""
    count: int
    """How many there would be, if none were cut."""
    lost: str
    """The part of the cleaned prompt that is cut."""
    unknown: tuple[str, ...]
    """Pieces of the prompt that the tokenizer does not know, each once."""

    def warnings(self, name: str) -> list[str]:
        """What a user should know of it, a line each; `name` says which prompt it is."""
        lines = []
        if self.count > len(self.ids):
            lines.append(
                f"the {name} is cut: it has {self.count} tokens, the model takes {len(self.ids)}; "
                f"what is lost begins with {_quoted(self.lost)}"
            )
        if self.unknown:
            more = f" and {len(self.unknown) - MOST} more" if len(self.unknown) > MOST else ""
            pieces = ", ".join(map(_quoted, self.unknown[:MOST]))
            lines.append(f"the {name} holds what the tokenizer does not know, and reads as {UNKNOWN}: {pieces}{more}")
        return lines


def _quoted(text: str) -> str:
    return f"'{text}'" if len(text) <= 40 else f"'{text[:39]}…'"


def prompt_warnings(
    tokenize: Callable[[str], Tokens], prompt: str | None, negative: Any, own_negative: str, *, guided: bool
) -> tuple[str, ...]:
    """What a user should know of the prompts of a run, a line each: the words of the API and of all commands.

    Args:
        tokenize: the tokenizer.
        prompt: what to show; None where there are embeddings in its place.
        negative: what not to show, or its embeddings; None where neither is given.
        own_negative: the model's own negative prompt.
        guided: the run uses a negative prompt.
    """
    used = {"prompt": prompt}
    if guided:
        used["negative prompt"] = own_negative if negative is None else negative
    lines = [line for name, text in used.items() if isinstance(text, str) for line in tokenize(text).warnings(name)]
    return tuple(lines) if guided or negative is None else (*lines, UNUSED_NEGATIVE)


class Tokenizer:
    """The bundle's tokenizer."""

    def __init__(self, file: Path, length: int) -> None:
        """Read `tokenizer.json`; prompts are cut to `length` tokens, the end token kept.

        Raises:
            UsageError: the file is not a tokenizer.
        """
        from tokenizers import Tokenizer as Fast

        try:
            self._tokenizer = Fast.from_file(str(file))
        except Exception as error:  # tokenizers raises plain exceptions
            raise UsageError(f"{file} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)
        self._unknown = self._tokenizer.token_to_id(UNKNOWN)

    def __call__(self, prompt: str) -> Tokens:
        """Clean a prompt and tokenise it."""
        cleaned = clean_prompt(prompt)
        kept = self._tokenizer.encode(cleaned)
        rest = [
            start
            for piece in kept.overflowing
            for (start, _), special in zip(piece.offsets, piece.special_tokens_mask, strict=True)
            if not special
        ]
        found = zip(kept.ids, kept.offsets, strict=True)
        unknown = dict.fromkeys(cleaned[start:end] for token, (start, end) in found if token == self._unknown)
        lost = cleaned[rest[0] :].strip() if rest else ""
        return Tokens(kept.ids, len(kept.ids) + len(rest), lost, tuple(unknown))
