"""Prompts as the reference understands them, and what is said of those that it does not."""

import ftfy
import numpy as np
import pyrexport
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.pipeline import text
from pyrexport.runtime.pipeline.text import UNUSED_NEGATIVE, Tokenizer, clean_prompt
from pyrexport.runtime.proof.metrics import distance
from support.builders import resign
from support.prompts import LENGTH, PROMPTS, ids_in_diffusers, write_own_tokenizer


def test_prompts_are_cleaned_as_diffusers_does():
    for prompt in (*PROMPTS, *map(chr, range(0x3000))):
        assert clean_prompt(prompt) == prompt_clean(prompt), ascii(prompt)
    assert clean_prompt("a cat’s “red” ﬁsh") == 'a cat\'s "red" fish'


def test_prompts_have_the_tokens_of_diffusers(tmp_path, monkeypatch):
    tokenizer = Tokenizer(write_own_tokenizer(tmp_path / "tokenizer"), LENGTH)
    expected = [ids_in_diffusers(tmp_path / "tokenizer", prompt, LENGTH) for prompt in PROMPTS]
    assert [tokenizer(prompt).ids for prompt in PROMPTS] == expected
    monkeypatch.setattr(ftfy, "fix_text", lambda prompt: prompt)
    assert tokenizer(PROMPTS[2]).ids != expected[2]  # this tokenizer tells a prompt that is mended from one that is not


def test_long_empty_and_foreign_prompts_encode_as_the_reference_does(bundle, tiny):
    reference = Reference(read_checkpoint(tiny))
    prompts = ["", "a " * 500, "漢字", "🎈 balloon"]
    expected = reference.encode(prompts)
    with pyrexport.load(bundle, resident=True) as pipeline:
        for prompt, embeds in zip(prompts, expected, strict=True):
            assert distance(pipeline.encode(prompt), embeds).relative_l2 < 1e-5, prompt


def test_what_is_cut_and_what_is_unknown_are_told_of_the_prompt_that_is_used(tmp_path):
    tokenizer = Tokenizer(write_own_tokenizer(tmp_path / "tokenizer"), LENGTH)
    (whole,) = Tokenizer(tmp_path / "tokenizer" / "tokenizer.json", 4096)("red " * 60).ids[-1:]
    for words in (LENGTH, LENGTH - 1):
        found = tokenizer("☃ " * words)  # a snowman is two tokens here: the blank, and what is not known
        assert found.count == 2 * words + 1
        assert found.ids[-1] == whole, "the end token is kept"
        assert len(found.ids) == LENGTH
        assert found.unknown == ("☃",)
        assert found.lost == clean_prompt("☃ " * words)[-len(found.lost) :]
    assert tokenizer("☃ " * 23).count == LENGTH - 1
    assert tokenizer("☃ " * 23).lost == ""
    assert tokenizer("a red circle" + 30 * " a" + " ☃").unknown == (), "what is cut is not read"
    assert tokenizer("a red circle").warnings("prompt") == []
    lines = tokenizer("ђ ѓ ☃ ќ ѝ ў џ " * 9).warnings("negative prompt")
    assert len(lines) == 2
    assert lines[0].startswith(f"the negative prompt is cut: it has 127 tokens, the model takes {LENGTH}; what is lost")
    assert lines[1].endswith("reads as <unk>: 'ђ', 'ѓ', '☃', 'ќ', 'ѝ' and 2 more")


def test_a_sample_tells_of_its_prompts(bundle):
    with pyrexport.load(bundle, resident=True) as pipeline:

        def warnings(*arguments, **options):
            how = {"schedule": "1-1-1", "output_type": "latent"} | options
            return pipeline(*arguments, **how).warnings

        embeds = np.zeros_like(pipeline.encode("a"))
        assert warnings("a cat") == ()
        assert warnings(prompt_embeds=embeds) == ()
        assert warnings("a cat", negative_prompt="a dog") == (UNUSED_NEGATIVE,)
        assert warnings("a cat", negative_prompt_embeds=embeds) == (UNUSED_NEGATIVE,)
        assert warnings("a cat", negative_prompt="a dog", guidance_scale=2.0) == ()
        cut, unknown, negative = warnings("漢 " + "a " * 99, negative_prompt="字", guidance_scale=2.0)
        assert cut.startswith("the prompt is cut: it has ")
        assert unknown.endswith("'漢'")
        assert negative.startswith("the negative prompt holds")


@pytest.mark.parametrize(
    ("built", "found", "words"), [("5.9", "6.3.1", "5.9, found ftfy 6.3.1"), ("6.0", None, "6.0, found none")]
)
def test_prompts_that_would_be_cleaned_otherwise_are_refused(copy, tmp_path, refused, monkeypatch, built, found, words):
    def version(name):
        if found is None:
            raise text.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(text, "version", version)
    entry = pyrexport.runtime.bundle.opening.open_bundle(copy).manifest.text.to_json()
    resign(copy, text=entry | {"cleaning": {"ftfy": built}})
    line = refused("sample", copy, "--prompt", "a", "-o", tmp_path / "a.npy")
    assert f"was built with prompts cleaned by ftfy {words}" in line
    assert f"pip install 'ftfy=={built[0]}.*'" in line


@pytest.mark.parametrize("cleaning", [None, {}, {"ftfy": 6}, {"ftfy": "6 or so"}, {"ftfy": "6.3.1", "more": 1}])
def test_a_manifest_says_how_prompts_are_cleaned(copy, cleaning):
    entry = pyrexport.runtime.bundle.opening.open_bundle(copy).manifest.text.to_json()
    resign(copy, text=entry | {"cleaning": cleaning})
    with pytest.raises(UsageError, match="cleaning"):
        pyrexport.load(copy)
