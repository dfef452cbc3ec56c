"""Manifests that anything may have happened to."""

import json
import random
from contextlib import suppress

from pyrexport.runtime.bundle.manifest import parse_manifest, signed
from pyrexport.runtime.errors import PyrexportError


def mutate(value, chance: random.Random):
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {chance.choice(["x", "", "../a", key + "x"]): value[key]}
        return value | {key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        return [*value[:index], mutate(value[index], chance), *value[index + 1 :]]
    odd = [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1e308,
        float("nan"),
        "",
        "x" * 300,
        "../../etc/passwd",
        [],
        {},
        [[]],
        0.5,
        "\ud800",
    ]
    return chance.choice(odd)


def test_ten_thousand_fuzzed_manifests_are_read_or_refused(bundle):
    """Signed again, so that only the checks stand between them and the runtime: about 5 s."""
    original = json.loads((bundle / "manifest.json").read_text())
    chance, accepted = random.Random(0), 0
    for _ in range(10_000):
        document = mutate(original, chance)
        if not isinstance(document, dict):
            continue
        with suppress(PyrexportError):  # anything else fails the test
            parse_manifest(signed(document), "manifest.json")
            accepted += 1
    # Provenance, prompts and hashes may say anything; the rest may not.
    assert accepted < 6_000
