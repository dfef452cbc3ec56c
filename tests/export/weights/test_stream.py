"""Weights from a checkpoint to a file."""

import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from pyrexport.export.bundle.blueprint import draw
from pyrexport.export.bundle.options import BuildRequest, resolve_options
from pyrexport.export.weights import stream
from pyrexport.export.weights.places import place_weights
from pyrexport.export.weights.quantising import Channels, Quantise
from pyrexport.export.weights.source import Source
from pyrexport.export.weights.steps import Cast, Matrix, Stored, Transpose
from pyrexport.export.weights.stream import write_component
from pyrexport.runtime.bundle.manifest import WEIGHTS_FILE
from pyrexport.runtime.model.checkpoint import read_checkpoint
from pyrexport.runtime.model.safetensors import read_header
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.targets.facts import find_build_target
from safetensors.numpy import load_file, save_file


@pytest.mark.parametrize("method", ["w4", "w8a8-dynamic"])
def test_weights_do_not_depend_on_the_size_of_the_pieces_they_are_read_in(tiny, tmp_path, monkeypatch, method):
    """In 16 bits and by one row at a time, too: a piece of one row has the strides of the whole matrix."""
    checkpoint = read_checkpoint(tiny)
    target = find_build_target("ort")
    options = resolve_options(
        checkpoint,
        target,
        BuildRequest({"vae": "bf16", "text_encoder": "fp16"}, {"transformer": method, "text_encoder": "w8"}),
    )
    places = draw(checkpoint, target, options).files[WEIGHTS_FILE]
    written = []
    for chunk in (stream.CHUNK, 1024, 260):
        monkeypatch.setattr(stream, "CHUNK", chunk)
        file = tmp_path / str(chunk)
        file.write_bytes(bytes(places.nbytes))
        counts = []
        for component, tensors in checkpoint.components.items():
            write_component(tensors, places, component, file, counts.append)
        assert sum(counts) == places.weight_bytes
        written.append(file.read_bytes())
    assert written[0] == written[1] == written[2]
    assert len(written[0]) > 10**5


@dataclass(frozen=True)
class Scale:
    """Each row times its own number: a step that the package does not have."""

    factors: tuple[float, ...]
    pieces: list[int] = field(default_factory=list, compare=False)
    """Bytes of the rows that it was given."""

    @property
    def turns(self) -> bool:
        """Rows stay rows."""
        return False

    def shape(self, given: Stored) -> tuple[Stored, ...]:
        """The same."""
        return (given,)

    def apply(self, rows: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """By the factors of these rows."""
        self.pieces.append(rows.numel() * rows.element_size())
        factors = torch.tensor(self.factors[start : start + len(rows)])
        return (rows * factors.view(-1, *[1] * (rows.ndim - 1)),)


@pytest.mark.parametrize(
    "steps", [(), (Cast("bfloat16"), Matrix(), Transpose()), (Quantise(SCHEMES["w4"]),), (Channels(63, True),)]
)
def test_a_step_of_somebody_elses_is_streamed_as_ours_are(tmp_path, monkeypatch, steps):
    """Between a tensor and the steps that the package has, in pieces of at most `CHUNK`."""
    rows, columns = 100, 48
    rng = np.random.default_rng(0)
    tensor = torch.from_numpy(rng.standard_normal((rows, columns), np.float32))
    scale = Scale(tuple(rng.uniform(0.5, 2, rows).tolist()))
    save_file({"a.weight": tensor.numpy()}, tmp_path / "model.safetensors")
    tensors = read_header(tmp_path / "model.safetensors")
    outputs = range(len(steps[-1].shape(Stored((rows, columns), "float32"))) if steps else 1)
    sources = [Source.of("transformer", "a.weight", tensors["a.weight"], (scale, *steps), each) for each in outputs]
    places = place_weights(sources)
    monkeypatch.setattr(stream, "CHUNK", 7 * 4 * columns + 3)
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(places.nbytes))
    write_component(tensors, places, "transformer", file, lambda count: None)
    assert scale.pieces == [7 * 4 * columns] * 14 + [2 * 4 * columns]
    made = (tensor * torch.tensor(scale.factors)[:, None],)
    for step in steps:
        made = step.apply(made[0], 0)
    content = file.read_bytes()
    for source, whole in zip(sources, made, strict=True):
        place = places.of[source]
        expected = whole.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert content[place.offset : place.offset + place.nbytes] == expected


def test_values_that_storage_cannot_hold(make_checkpoint, refused, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("--no-vae", "--no-text-encoder", "--blocks", "1"), folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.weight"][3, 5] = 70000
    save_file(tensors, file)
    line = refused("build", folder, "--target", "ort", "-o", tmp_path / "out", "--precision", "fp16", "--quiet")
    assert "'blocks.0.attn1.to_q.weight' holds values that are not finite in float16" in line
    for options in (["--quantize", "text_encoder=w8"], ["--vae-tile", "16x16"], ["--vae-caches", "fp16"]):
        assert "says nothing" in refused("build", folder, "--target", "ort", "-o", tmp_path / "x", *options).replace(
            "say nothing", "says nothing"
        )
