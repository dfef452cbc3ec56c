"""The text side of the demonstration: its tokenizer and its encoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from moving_shapes import PHRASINGS, SCENES
from pyrexport.export.init.tokenizer import make_tokenizer
from shapes_checkpoint import TEXT_LENGTH, UMT5
from tokenizers import Tokenizer
from transformers import UMT5Config, UMT5EncoderModel


@dataclass(frozen=True)
class Text:
    """What makes embeddings of prompts."""

    tokenizer: Tokenizer
    encoder: UMT5EncoderModel
    frozen: bool
    """It was trained before, and is left as it is."""


def open_text(parts: Path | None, seed: int) -> Text:
    """The tokenizer and the text encoder of another checkpoint, or new ones."""
    if parts is not None:
        encoder = UMT5EncoderModel.from_pretrained(parts / "text_encoder", torch_dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(parts / "tokenizer" / "tokenizer.json"))
        return Text(tokenizer, encoder.requires_grad_(False), frozen=True)
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel(UMT5Config(**UMT5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    corpus = [scene.prompt(i) for scene in SCENES for i in range(len(PHRASINGS))]
    return Text(make_tokenizer(corpus, UMT5["vocab_size"]), encoder, frozen=False)


def tokens_of(tokenizer: Tokenizer, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [scenes · phrasings + 1, text length]; the last prompt is empty."""
    tokenizer.enable_truncation(TEXT_LENGTH)
    tokenizer.enable_padding(length=TEXT_LENGTH, pad_id=0)
    words = [scene.prompt(i) for scene in SCENES for i in range(len(PHRASINGS))] + [""]
    encoded = [tokenizer.encode(text) for text in words]
    return (
        torch.tensor([e.ids for e in encoded], device=device),
        torch.tensor([e.attention_mask for e in encoded], device=device),
    )
