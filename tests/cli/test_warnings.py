"""What `sample` warns of: the words of the Python API, from a bundle and from a checkpoint."""

import json

import pyrexport
from pyrexport.runtime.pipeline.text import UNUSED_NEGATIVE

FAST = ("--schedule", "1-1-1", "--quiet")


def test_a_bundle_and_its_checkpoint_warn_of_the_same(bundle, tiny, cli, tmp_path):
    prompt, negative = "漢 " + "a " * 99, "字"
    arguments = ("--prompt", prompt, "--negative-prompt", negative, *FAST)
    with pyrexport.load(bundle) as pipeline:
        how = {"schedule": "1-1-1", "output_type": "latent", "negative_prompt": negative}
        unguided = pipeline(prompt, **how).warnings
        guided = pipeline(prompt, **how, guidance_scale=2.0).warnings
    assert (len(unguided), len(guided)) == (3, 3)
    assert unguided[-1] == UNUSED_NEGATIVE
    for model in (bundle, tiny):
        plain = cli("sample", model, "-o", tmp_path / "a.npy", *arguments)
        assert plain.stderr.splitlines() == [f"Warning: {line}" for line in unguided]
        told = cli("sample", model, "-o", tmp_path / "a.npy", *arguments, "--json", "--guidance-scale", 2)
        assert told.stderr.splitlines() == [f"Warning: {line}" for line in guided]
        assert json.loads(told.stdout)["warnings"] == list(guided)


def test_nothing_is_said_of_a_prompt_that_is_read_whole(bundle, cli, tmp_path):
    done = cli("sample", bundle, "--prompt", "a cat", "-o", tmp_path / "a.npy", *FAST, "--json")
    assert done.stderr == ""
    assert json.loads(done.stdout)["warnings"] == []


def test_of_many_prompts_each_line_is_said_once_with_the_clips_that_it_is_about(bundle, cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("漢\na cat\n漢\n", "utf-8")
    arguments = ("--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "clips", "--negative-prompt", "a dog", *FAST)
    done = cli("sample", bundle, *arguments, "--json")
    unknown, negative = done.stderr.splitlines()
    assert unknown.startswith("Warning: 0000.mp4, 0002.mp4: the prompt holds")
    assert negative == f"Warning: {UNUSED_NEGATIVE}"
    assert [len(sample["warnings"]) for sample in json.loads(done.stdout)["samples"]] == [2, 1, 2]
    assert json.loads(cli("sample", bundle, *arguments, "--json").stdout)["samples"][0]["kept"] is True
