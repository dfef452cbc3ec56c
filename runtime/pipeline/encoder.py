"""Prompts to embeddings: tokens, their rows of the table, and the text encoder's shortest graph that holds them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.entries import TableEntry, TextEntry
from ..bundle.graphs import text_key
from ..bundle.manifest import TOKENIZER_FILE, WEIGHTS_FILE
from ..chain.sampler import Conditions, floats
from ..dtypes import DTYPES, stored_values
from ..errors import UsageError
from .graphs import OpenGraphs
from .prompts import PromptCache
from .text import Tokenizer, Tokens

__all__ = ["TextEncoder"]

Array = NDArray[np.float32]


class TextEncoder:
    """The text encoder of a bundle; its tokenizer is read when it is first needed."""

    def __init__(self, graphs: OpenGraphs, cache: PromptCache | None = None) -> None:
        """Take the graphs of a bundle, and what keeps embeddings, if anything does; nothing is read yet."""
        self.graphs, self.cache = graphs, cache
        self._tokenizer: Tokenizer | None = None

    def encode(self, prompt: str) -> Array:
        """Embeddings of a prompt [text length, text width], zero after its end.

        Raises:
            UsageError: the bundle has no text encoder.
        """
        width, ids = self._entry().table.width, self.tokens(prompt).ids
        text = None if self.cache is None else self.cache.get(ids, (self._length(ids), width))
        if text is None:
            embeddings, mask = self.embed(prompt)
            graph = text_key(self._length(ids))
            text = self.graphs.run(graph, {"embeddings": embeddings, "mask": mask})["text"][0]
            if self.cache is not None:
                self.cache.put(ids, text)
        out = np.zeros((self.graphs.bundle.manifest.model.text_length, width), np.float32)
        out[: len(text)] = text
        return out

    def embed(self, prompt: str) -> tuple[Array, Array]:
        """What the graph is given: rows of the table [1, L, text width] and their mask [1, L], L the shortest length.

        Raises:
            UsageError: the bundle has no text encoder.
        """
        bundle, text, ids = self.graphs.bundle, self._entry(), self.tokens(prompt).ids
        length = self._length(ids)
        mask = np.zeros((1, length), np.float32)
        mask[0, : len(ids)] = 1
        embeddings = np.zeros((1, length, text.table.width), np.float32)
        embeddings[0, : len(ids)] = _rows(bundle.file(WEIGHTS_FILE), text.table, ids)
        return embeddings, mask

    def _length(self, ids: Sequence[int]) -> int:
        """Of the shortest graph that holds some tokens."""
        return next(n for n in self._entry().lengths if n >= len(ids))

    def tokens(self, prompt: str) -> Tokens:
        """A prompt cleaned and tokenised.

        Raises:
            UsageError: the bundle has no text encoder.
        """
        self._entry()
        if self._tokenizer is None:
            bundle = self.graphs.bundle
            self._tokenizer = Tokenizer(bundle.file(TOKENIZER_FILE), bundle.manifest.model.text_length)
        return self._tokenizer(prompt)

    def conditions(self, prompt: str | None, embeds: Array | None, name: str) -> Conditions:
        """What the stages are given of a prompt, or of its embeddings [text length, text width].

        Raises:
            UsageError: neither is given, or both, or one does not fit.
        """
        if (prompt is None) == (embeds is None):
            raise UsageError(f"give either {name} or {name}_embeds")
        if embeds is None:
            if not isinstance(prompt, str):
                raise UsageError(f"{name} is one string, found {type(prompt).__name__}: call once for each video")
            return {"text": self.encode(prompt)}
        model = self.graphs.bundle.manifest.model
        return {"text": floats(embeds, (model.text_length, model.transformer.text_dim), f"{name}_embeds")}

    def both(
        self,
        prompt: str | None,
        embeds: Array | None,
        negative: str | None,
        negative_embeds: Array | None,
        *,
        guided: bool,
    ) -> tuple[Conditions, Conditions | None]:
        """What the stages are given of a prompt, and, where a run is guided, of a negative one; see `conditions`."""
        conditions = self.conditions(prompt, embeds, "prompt")
        return conditions, self.negative(negative, negative_embeds) if guided else None

    def negative(self, prompt: str | None, embeds: Array | None) -> Conditions:
        """Those of a negative prompt or its embeddings: of the model's own, where neither is given."""
        own = self.graphs.bundle.manifest.model.negative_prompt if prompt is None and embeds is None else prompt
        return self.conditions(own, embeds, "negative_prompt")

    @property
    def cache_warnings(self) -> tuple[str, ...]:
        """See `PromptCache.warnings`."""
        return () if self.cache is None else tuple(dict.fromkeys(self.cache.warnings))

    def _entry(self) -> TextEntry:
        text = self.graphs.bundle.manifest.text
        if text is None:
            raise UsageError(f"{self.graphs.bundle.folder} has no text encoder: give prompt_embeds")
        return text


def _rows(file: Path, table: TableEntry, ids: list[int]) -> Array:
    """Rows of the embedding table, read from the mapped weights file."""
    if ids and max(ids) >= table.rows:
        raise UsageError(f"the tokenizer gives token {max(ids)}, the embedding table has {table.rows} rows")
    stored = np.dtype(DTYPES[table.dtype].storage)
    mapped = np.memmap(file, stored, "r", table.offset, (table.rows, table.width))
    return stored_values(np.asarray(mapped[ids]), table.dtype).astype(np.float32)
