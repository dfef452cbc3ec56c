"""Prompts as the reference understands them."""

import pyrexport
from pyrexport.export.reference.reference import Reference
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.pipeline.text import clean_prompt
from pyrexport.runtime.proof.metrics import distance


def test_prompts_are_cleaned_as_diffusers_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in ("", "  a\n\tb ", "&lt;b&gt; &amp;amp;lt;", "l’été â€œquotedâ€\x9d", "漢字　かな", "a" * 3000):
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_long_empty_and_foreign_prompts_encode_as_the_reference_does(bundle, tiny):
    reference = Reference(read_checkpoint(tiny))
    prompts = ["", "a " * 500, "漢字", "🎈 balloon"]
    expected = reference.encode(prompts)
    with pyrexport.load(bundle, resident=True) as pipeline:
        for prompt, embeds in zip(prompts, expected, strict=True):
            assert distance(pipeline.encode(prompt), embeds).relative_l2 < 1e-5, prompt
