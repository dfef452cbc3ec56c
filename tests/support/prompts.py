"""Prompts that are easily read in two ways, and how diffusers reads them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import WanPipeline
from pyrexport.export.init.tokenizer import make_tokenizer, write_tokenizer
from transformers import AutoTokenizer

LENGTH = 48
PROMPTS = (
    "",
    "a red circle moving left",
    "a cat’s “red” ﬁsh",
    "  white\tspace\r\n of  every\u2028kind\u3000here\xa0\x85 ",
    "&lt;b&gt; a &amp;amp; b &#39;c&#x27; &#28;d&nbsp;e",
    "l’Ã©tÃ© â€œquotedâ€\x9d \x1b[31mred\x1b[0m",
    "👩\u200d🚀 with a 🎈 ✨\ufe0f",
    "漢字　かな ｆｕｌｌ ｗｉｄｔｈ ﾊﾝｶｸ",
    "Привет, שלום, مرحبا, नमस्ते",
    "cafe\u0301 naïve \ufeffmark",
    "half a pair \udc00, a whole \ud83d\ude00",
    "a long one " * 30,
)


def write_own_tokenizer(folder: Path) -> Path:
    """A tokenizer that knows all letters of these prompts as they are, so that it tells them from mended ones."""
    letters = [" ".join(prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) for prompt in PROMPTS]
    write_tokenizer(folder, make_tokenizer([*letters, *letters, 'a cat\'s "red" fish'], 400))
    return folder / "tokenizer.json"


def ids_in_diffusers(folder: Path, prompt: str, length: int) -> list[int]:
    """What an unmodified WanPipeline gives its text encoder, padding left out."""
    seen: list[list[int]] = []

    def encoder(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        seen.append(ids[0, : int(mask.sum())].tolist())
        return SimpleNamespace(last_hidden_state=torch.zeros(1, length, 1))

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    pipeline: Any = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, _execution_device="cpu")
    WanPipeline._get_t5_prompt_embeds(
        pipeline, prompt, max_sequence_length=length, device=torch.device("cpu"), dtype=torch.float32
    )
    return seen[0]
