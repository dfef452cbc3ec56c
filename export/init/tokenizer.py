"""A tokenizer like T5's, trained in a moment on a few sentences."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .documents import write_json

__all__ = ["make_tokenizer", "write_tokenizer"]


def make_tokenizer(corpus: list[str], vocab_size: int) -> Tokenizer:
    """A unigram tokenizer with T5's special tokens, trained on a corpus; the same corpus gives the same ids."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    _put_in_order(tokenizer, len(specials))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _put_in_order(tokenizer: Tokenizer, specials: int) -> None:
    """Order the pieces by score, then by name: the trainer's order is that of a hash table, another in each process.

    Single characters that it only keeps for completeness get scores a ten-thousandth apart, just above the lowest: they
    share these in their own order.
    """
    trained = json.loads(tokenizer.to_str())["model"]
    rest = [(piece, round(score, 6)) for piece, score in trained["vocab"][specials:]]
    bound = min(score for _, score in rest) + 1e-4 * len(rest)
    kept = sorted(piece for piece, score in rest if len(piece) == 1 and score <= bound)
    scores = sorted((score for piece, score in rest if piece in kept), reverse=True)
    rest = sorted((entry for entry in rest if entry[0] not in kept), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [*map(tuple, trained["vocab"][:specials]), *rest, *zip(kept, scores, strict=True)]
    tokenizer.model = models.Unigram(vocabulary, trained["unk_id"], byte_fallback=False)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files as transformers reads them."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "unk_token": "<unk>",
        },
    )
