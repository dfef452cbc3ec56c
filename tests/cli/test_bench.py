"""What `bench` and `inspect` say of a bundle."""

import json
from pathlib import Path


def test_bench_compares_a_bundle_with_its_own_checkpoint_alone(bundle, tiny, make_checkpoint, refused):
    plain = make_checkpoint("--kind", "plain", "--resolution", "17x64x64")
    assert "is another model" in refused("bench", bundle, "--reference", plain, "--quiet")
    assert "not a checkpoint" in refused("bench", bundle, "--reference", bundle, "--quiet")
    assert "unknown schedule" in refused("bench", bundle, "--reference", tiny, "--schedule", "fast", "--quiet")


def test_bench_reports_every_graph(bundle, cli):
    document = json.loads(cli("bench", bundle, "--runs", 2, "--quiet", "--json").stdout)
    assert set(document["graphs"]) == {"stage0", "stage1", "stage2", "vae_first", "vae_next"}
    assert document["graphs"]["stage2"]["calls"] == 2
    assert 0 <= document["glue_share"] <= 1
    assert document["peak_anonymous_bytes"] > 0


def test_inspect_shows_a_bundle(bundle, cli):
    document = json.loads(cli("inspect", bundle, "--json", "--quiet").stdout)
    parts = ("transformer", "text_encoder", "vae", "tiny_decoder", "compute")
    assert document["precision"] == dict.fromkeys(parts, "fp32")
    assert document["stages"][0]["tokens"] == 80
    assert document["files"]["weights.bin"] == (bundle / "weights.bin").stat().st_size
    assert Path(document["model"]) == bundle
