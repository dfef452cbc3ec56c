"""Prompts as diffusers' WanPipeline handles them: cleaned, tokenised, cut to the text length."""

import html
import re
from pathlib import Path

from ..errors import UsageError

__all__ = ["Tokenizer", "clean_prompt"]


def clean_prompt(prompt: str) -> str:
    """Mend the encoding (if ftfy is installed, as diffusers does), unescape HTML twice, collapse white space."""
    try:
        import ftfy
    except ImportError:
        pass
    else:
        prompt = ftfy.fix_text(prompt)
    prompt = html.unescape(html.unescape(prompt)).strip()
    return re.sub(r"\s+", " ", prompt).strip()


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

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with its end token, without padding."""
        ids: list[int] = self._tokenizer.encode(clean_prompt(prompt)).ids
        return ids
