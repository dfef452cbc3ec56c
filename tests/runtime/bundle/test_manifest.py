"""What is written is what is read again: manifests, models, configurations, and the entries of traces."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from pyrexport.runtime.bundle.graphs import Decoder, graph_specs
from pyrexport.runtime.bundle.manifest import MANIFEST_FILE, Manifest, parse_manifest, signed
from pyrexport.runtime.bundle.opening import open_bundle
from pyrexport.runtime.bundle.tiles import Tiles
from pyrexport.runtime.chain.schedules import MAX_GUIDANCE, Schedule
from pyrexport.runtime.documents import MAX_INTEGER
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.description import Model, bare_model, parse_model
from pyrexport.runtime.model.families.wan import WAN, WanConfig
from pyrexport.runtime.model.families.wan_decoder import WanDecoderConfig
from pyrexport.runtime.model.schedules import ScheduleEntry
from pyrexport.runtime.proof.trace import Probe, Run

Make = Callable[..., Path]


def through_text(document: Any) -> Any:
    """A document as it comes out of a file."""
    return json.loads(json.dumps(document))


@pytest.fixture(params=["pyramidal", "ppf"])
def manifest(request: pytest.FixtureRequest, make_bundle: Make) -> Manifest:
    """The manifest of a tiny bundle."""
    kind = () if request.param == "pyramidal" else ("--kind", request.param)
    return open_bundle(make_bundle(*kind)).manifest


def with_parts(manifest: Manifest, *, text: bool, decoder: Decoder | None) -> Manifest:
    """A manifest with the text encoder or not, and with frames decoded in a given way or not at all."""
    entry, decoders = manifest.text if text else None, {} if decoder is None else {decoder.component: decoder}
    model = replace(manifest.model, decoders={name: manifest.model.decoders[name] for name in decoders})
    (size,) = manifest.sizes
    specs = graph_specs(model, {size.resolution: list(decoders.values())}, entry.lengths if entry else ())[
        size.resolution
    ]
    graphs = {key: replace(size.graphs[key], spec=spec) for key, spec in specs.items()}
    return replace(manifest, model=model, text=entry, sizes=(replace(size, decoders=decoders, graphs=graphs),))


def test_a_bundles_manifest_is_read_again_as_it_was(manifest: Manifest) -> None:
    assert parse_manifest(through_text(manifest.to_json()), "again") == manifest


@pytest.mark.parametrize("kind", [(), ("--kind", "ppf")])
def test_a_manifest_that_was_read_is_written_as_its_file(make_bundle: Make, kind: tuple[str, ...]) -> None:
    file = make_bundle(*kind) / MANIFEST_FILE
    written = json.loads(file.read_text("utf-8"))
    assert through_text(parse_manifest(written, "file").to_json()) == written


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(
    "decoder",
    [
        None,
        Decoder("vae", Tiles((8, 8), (8, 8)), "float32"),
        Decoder("vae", Tiles((8, 8), (4, 6)), "float16"),
        Decoder("vae", Tiles((8, 8), (5, 5)), "float32", packed=True),
    ],
)
def test_every_shape_of_a_manifest_is_read_again(manifest: Manifest, text: bool, decoder: Decoder | None) -> None:
    changed = with_parts(manifest, text=text, decoder=decoder)
    assert parse_manifest(through_text(changed.to_json()), "again") == changed


def test_a_frame_rate_is_read_again_and_one_that_cannot_be_is_refused(manifest: Manifest) -> None:
    changed = replace(manifest, frame_rate=24)
    assert manifest.frame_rate == WAN.frame_rate == 16
    assert parse_manifest(through_text(changed.to_json()), "again") == changed
    for rate in (0, 241, 16.0, True, None):
        with pytest.raises(UsageError, match="'frame_rate': expected a whole number from 1 to 240"):
            parse_manifest(signed(manifest.to_json() | {"frame_rate": rate}), "again")


def test_results_options_and_memory_are_read_again(manifest: Manifest) -> None:
    parity = {"passed": False, "levels": {"stages": {"relative_l2": 0.1 + 0.2, "passed": False}}}
    (size,) = manifest.sizes
    graphs = {key: replace(entry, memory=None, facts={"names": ["ä"]}) for key, entry in size.graphs.items()}
    changed = replace(
        manifest,
        parity={str(size.resolution): parity},
        graph_parity={str(size.resolution): parity | {"passed": True}},
        target_options={"layout": "shared", "compute_capabilities": ["8.9"]},
        sizes=(replace(size, graphs=graphs),),
        text=replace(manifest.text, ftfy="6.10.0rc1"),
    )
    assert parse_manifest(through_text(changed.to_json()), "again") == changed


def test_ranges_are_read_again_and_those_that_hold_nothing_are_refused(manifest: Manifest) -> None:
    depth, layer = manifest.model.pyramid.depth, "blocks.0.attn1.to_q"
    changed = replace(manifest, quantised={"transformer": "w8a8"}, ranges={layer: ((-1.5, 0.1 + 0.2),) * depth})
    assert parse_manifest(through_text(changed.to_json()), "again") == changed
    for pair in ([0, 0], [1, 2], [-2, -1], [-1, 1, 1], [-1], [None, 1], [-1, float("inf")], 1):
        with pytest.raises(UsageError, match=f"'{layer}': expected for each of {depth} stage"):
            parse_manifest(signed(changed.to_json() | {"ranges": {layer: [pair] * depth}}), "again")
    with pytest.raises(UsageError, match=f"'{layer}': expected for each of {depth} stage"):
        parse_manifest(signed(changed.to_json() | {"ranges": {layer: [[-1, 1]] * (depth + 1)}}), "again")
    with pytest.raises(UsageError, match="'ranges': expected none, where no layer's input is rounded"):
        parse_manifest(signed(changed.to_json() | {"quantised": {"transformer": "w8a8-dynamic"}}), "again")


def models() -> dict[str, Model]:
    """Models of each kind, and with each field that has a choice."""
    config = WanConfig(num_attention_heads=2, num_layers=1)
    base = bare_model(WAN, config).to_json()
    schedules = {"levels": {"levels": [[1.0, 0.97], [], [0.2]], "shift": 3.0, "guidance_scale": 4.5}}
    documents = {
        "pyramidal": base,
        "joint": base | {"first_frame": "joint"},
        "axes": base | {"axes": "HW", "wavelet": "db2"},
        "taps": base | {"wavelet": [0.5**0.5, 0.5**0.5], "text_length": 64, "negative_prompt": "ugly, 丑"},
        "levels": base | {"schedules": schedules, "default_schedule": "levels", "clean_levels": [0, 0.25, 0.9]},
        "ppf": base | {"kind": "ppf", "patch_sizes": [[1, 2, 2], [2, 4, 4], [4, 8, 8]]},
        "plain": base | {"kind": "plain", "stages": 1, "clean_levels": [0], "default_schedule": "50"},
    }
    documents["plain"]["schedules"] = {"50": {"steps": [50]}, "2": {"levels": [[1.0, 0.83]]}}
    return {name: parse_model(document, WAN, config, name) for name, document in documents.items()}


@pytest.mark.parametrize("name", models())
def test_a_model_is_read_again_as_it_was(name: str) -> None:
    model = models()[name]
    assert parse_model(through_text(model.to_json()), WAN, model.transformer, "again") == model


def test_the_demonstrations_model_is_read_again_as_it_was() -> None:
    model = replace(read_checkpoint(DATA / "moving-shapes").model, decoders={})
    assert parse_model(through_text(model.to_json()), WAN, model.transformer, "again") == model


def test_a_bundle_spaces_steps_as_its_checkpoint_does() -> None:
    """The shift of a default schedule that has levels counts for steps which have no schedule."""
    model = models()["levels"]
    again = parse_model(through_text(model.to_json()), WAN, model.transformer, "again")
    assert again.schedule("4-4-4") == model.schedule("4-4-4")
    assert again.schedule("4-4-4") != models()["pyramidal"].schedule("4-4-4")


finite = st.floats(-1e9, 1e9)
guidance = st.floats(0, MAX_GUIDANCE)
levels = st.lists(st.lists(finite, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple)
steps = st.lists(st.integers(1, 9999), min_size=1, max_size=4).map(tuple)
sizes = st.integers(1, 2**31 - 1)


@given(st.one_of(steps.map(lambda n: {"steps": n}), levels.map(lambda n: {"levels": n})), finite, guidance)
def test_a_schedules_entry_is_read_again_as_it_was(how: dict[str, Any], shift: float, scale: float) -> None:
    entry = ScheduleEntry(**how, shift=shift, guidance_scale=scale)
    assert ScheduleEntry.from_json(through_text(entry.to_json()), "again") == entry


@given(st.tuples(sizes, sizes, sizes), sizes, st.integers(3, 1000), st.integers(1, 1000), st.floats(1e-12, 0.5), sizes)
def test_a_transformers_configuration_is_read_again_as_it_was(
    patch: tuple[int, int, int], channels: int, half_head: int, blocks: int, eps: float, size: int
) -> None:
    config = WanConfig(
        patch_size=patch,
        attention_head_dim=2 * half_head,
        in_channels=channels,
        out_channels=channels,
        num_layers=blocks,
        eps=eps,
        ffn_dim=size,
        rope_max_seq_len=size,
        cross_attn_norm=bool(size % 2),
    )
    document = through_text(config.to_json())
    assert WAN.read_transformer(document, "again") == config
    assert document["_class_name"] == WAN.transformer_class


@given(
    st.lists(st.integers(1, 1023), min_size=4, max_size=4).map(tuple),
    st.integers(1, 512),
    st.integers(1, 9),
    st.sampled_from([(False, True, True), (True, False, True), (True, True, False)]),
)
def test_a_decoders_configuration_is_read_again_as_it_was(
    factors: tuple[int, ...], width: int, blocks: int, downsample: tuple[bool, ...]
) -> None:
    config = WanDecoderConfig(16, width, factors, blocks, downsample)
    assert WAN.read_decoder(through_text(config.to_json()), WanConfig(), "again") == config


@given(st.text(), st.integers(0, MAX_INTEGER), levels, guidance, st.booleans())
def test_a_traces_run_is_read_again_as_it_was(prompt: str, seed: int, levels: Any, scale: float, decoded: bool) -> None:
    run = Run(prompt, seed, Schedule("2-2-1", levels, scale), decoded)
    assert Run.from_json(through_text(run.to_json()), "again") == run


@given(st.integers(0, 7), finite)
def test_a_traces_probe_is_read_again_as_it_was(stage: int, level: float) -> None:
    probe = Probe(stage, level)
    assert Probe.from_json(through_text(probe.to_json()), "again") == probe
