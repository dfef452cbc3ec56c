"""Steps of a weight: what each makes of a tensor, whole or some rows at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyrexport.export.weights.quantising import Channels, PositiveBlocks, Quantise
from pyrexport.export.weights.source import Source
from pyrexport.export.weights.steps import (
    TORCH_DTYPES,
    Cast,
    Matrix,
    Reshape,
    Stored,
    Tap,
    Transpose,
)
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.quantisation import SCHEMES
from pyrexport.targets.dialect import expand_blocks

INT4, INT8 = (Quantise(SCHEMES[name]) for name in ("w4", "w8"))

CASES = {
    "a cast to 16 bits": (Cast("float16"), (7, 5)),
    "a cast to 8 bits of precision": (Cast("bfloat16"), (7, 5)),
    "a cast of a vector": (Cast("float32"), (9,)),
    "a matrix of a kernel": (Matrix(), (6, 2, 3, 2)),
    "a matrix as it is": (Matrix(), (6, 4)),
    "a transposed matrix": (Transpose(), (7, 5)),
    "a transposed row": (Transpose(), (1, 5)),
    "the first tap": (Tap(0), (4, 3, 3, 2, 1)),
    "the last tap": (Tap(2), (4, 3, 3, 2, 1)),
    "whole blocks of 4 bits": (INT4, (5, 128)),
    "a block of 4 bits that is not full": (INT4, (5, 70)),
    "integers of a channel": (Channels(127, transposed=False), (5, 70)),
    "integers of a channel, transposed": (Channels(63, transposed=True), (5, 70)),
    "floats of 8 bits": (Channels(448, transposed=True, scales="bfloat16", dtype="float8_e4m3fn"), (5, 70)),
    "blocks with positive scales": (PositiveBlocks(SCHEMES["w4a16"]), (5, 128)),
    "blocks of 8 bits": (INT8, (3, 256)),
    "a block of 8 bits that is not full": (INT8, (3, 130)),
}


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> torch.Tensor:
    """Of both signs and of sizes that differ from row to row."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-3, 3, (shape[0], *[1] * (len(shape) - 1)))
    return torch.from_numpy(rng.standard_normal(shape) * sizes).to(TORCH_DTYPES[dtype])


def raw(tensor: torch.Tensor) -> bytes:
    """Its values as a file holds them."""
    content: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("step", "shape"), CASES.values(), ids=CASES)
def test_a_step_makes_what_it_says(step, shape, dtype):
    made = step.apply(values(shape, dtype), 0)
    said = step.shape(Stored(shape, dtype))
    assert [tuple(tensor.shape) for tensor in made] == [stored.shape for stored in said]
    assert [tensor.dtype for tensor in made] == [TORCH_DTYPES[stored.dtype] for stored in said]
    assert [len(raw(tensor)) for tensor in made] == [stored.nbytes for stored in said]
    assert all(tensor.is_contiguous() for tensor in made)


def test_another_shape_is_that_of_the_file_alone():
    """Rows that are in memory stay rows: values lie in the same order."""
    given_rows = values((6, 4), "float32")
    (made,) = Reshape((1, 3, 8)).apply(given_rows, 0)
    (said,) = Reshape((1, 3, 8)).shape(Stored((6, 4), "float32"))
    assert said == Stored((1, 3, 8), "float32")
    assert raw(made) == raw(given_rows)
    assert len(raw(made)) == said.nbytes


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_pieces_of_rows_make_the_bytes_of_the_whole(case, data):
    """Rows that become columns are put side by side, all others one below the other."""
    step, (_, *shape) = CASES[case]
    rows = data.draw(st.integers(1, 12), "rows")
    at_once = data.draw(st.integers(1, rows), "rows of a piece")
    tensor = values((rows, *shape), data.draw(st.sampled_from(["float32", "bfloat16"])), data.draw(st.integers(0, 99)))
    pieces = [step.apply(tensor[start : start + at_once], start) for start in range(0, rows, at_once)]
    for index, whole in enumerate(step.apply(tensor, 0)):
        parts = [piece[index] for piece in pieces]
        together = torch.cat(parts, dim=-1) if step.turns else torch.cat([part.flatten() for part in parts])
        assert raw(together) == raw(whole)


def test_the_steps_of_a_source_follow_each_other():
    steps = (Cast("bfloat16"), Matrix(), Transpose())
    assert Source("vae", "conv.weight", Stored((6, 2, 3, 2), "float32"), steps).stored == Stored((12, 6), "bfloat16")
    blocks, scales = (Source("text", "a.weight", Stored((5, 70), "float16"), (INT4,), output) for output in range(2))
    assert blocks.stored == Stored((5, 2, 32), "uint8")
    assert scales.stored == Stored((10,), "float32")


@pytest.mark.parametrize("step", [INT4, INT8], ids=["w4", "w8"])
@pytest.mark.parametrize("columns", [256, 200])
def test_blocks_are_symmetric_and_within_half_a_step(step, columns):
    """The largest value by size is the lowest level; one of nearly its size and other sign is cut by up to a step."""
    scheme, rows = step.scheme, 6
    half = 2 ** (scheme.bits - 1)
    matrix = values((rows, columns), "float32")
    matrix[0, : scheme.block] = 0
    stored, scales = (tensor.numpy() for tensor in step.apply(matrix, 0))
    blocks = -(-columns // scheme.block)
    padded = np.zeros((rows, blocks * scheme.block), np.float64)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, blocks, scheme.block)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    steps = largest / -half
    assert scales.reshape(rows, blocks, 1) == pytest.approx(steps, rel=1e-6, abs=0)
    levels = np.stack((stored & 15, stored >> 4), -1).reshape(padded.shape) if scheme.bits == 4 else stored
    exact = np.divide(padded, steps, out=np.zeros_like(padded), where=steps != 0)
    off = np.abs(levels - np.clip(exact + half, 0, 2 * half - 1)).reshape(rows, -1)[:, :columns]
    assert off.max() <= 0.5 + 1e-4  # they divide in float32
    read = expand_blocks(torch.from_numpy(stored), torch.from_numpy(scales), scheme.bits).numpy()[:, :columns]
    bound = np.broadcast_to(np.where(exact > half - 1, 1.0, 0.5) * np.abs(steps), padded.shape).reshape(rows, -1)
    assert (np.abs(read - matrix.numpy()) <= bound[:, :columns] * (1 + 1e-3)).all()
    assert not read[0, : scheme.block].any()


@pytest.mark.parametrize("largest", [63, 127])
def test_integers_are_symmetric_and_within_half_a_step_of_their_channel(largest):
    matrix = values((6, 200), "float32")
    matrix[2] = 0
    integers, scales = (tensor.numpy() for tensor in Channels(largest, transposed=True).apply(matrix, 0))
    expected = np.abs(matrix.numpy()).max(1) / largest
    expected[2] = 1
    assert scales == pytest.approx(expected, rel=1e-6)
    assert np.abs(integers).max(0).tolist() == [largest, largest, 0, largest, largest, largest]
    error = np.abs(integers.T * scales[:, None].astype(np.float64) - matrix.numpy())
    assert (error <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("method", ["w4a8", "w4a16"])
def test_blocks_with_positive_scales_cut_nothing(method):
    """Half a step at most, a scale's own rounding to 8 bits beside."""
    scheme = SCHEMES[method]
    rows = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    rows[2, : scheme.block] = 0
    rows[3, : scheme.block] = torch.rand(scheme.block) - 2
    values, scales = PositiveBlocks(scheme).apply(rows, 0)
    assert scales.dtype == torch.bfloat16
    assert bool((scales > 0).all())
    found = expand_blocks(values, scales.float(), 4, signed=scheme.signed)
    stored = np.stack((values.numpy() & 15, values.numpy() >> 4), axis=-1).reshape(6, -1).astype(int)
    integers = np.where(stored > 7, stored - 16, stored) if scheme.signed else stored - 8
    np.testing.assert_array_equal(found, integers * np.repeat(scales.float().view(6, -1).numpy(), scheme.block, axis=1))
    steps = scales.float().view(6, -1).repeat_interleave(scheme.block, dim=1)
    assert bool(((found - rows).abs() <= steps * (0.5 + 8 / 256)).all())
    assert torch.equal(found[2, : scheme.block], torch.zeros(scheme.block))
    with pytest.raises(UsageError, match=f"whole blocks of {scheme.block}, found rows of 100"):
        PositiveBlocks(scheme).shape(Stored((6, 100), "float32"))


def test_floats_of_8_bits_have_a_scale_for_each_channel():
    """A fraction of three bits: 2^-4 of a value at most; the largest of a row is the type's, and rows of zeros stay."""
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 6)[:, None]
    rows[4] = 0
    values, scales = Channels(448, transposed=False, dtype="float8_e4m3fn").apply(rows, 0)
    found = values.float() * scales[:, None]
    assert bool(((found - rows).abs() <= rows.abs() * 2**-4 + scales[:, None] * 2**-10).all())
    assert torch.equal(values.float().abs().amax(dim=1)[[0, 1, 2, 3, 5]], torch.full((5,), 448.0))
    assert torch.equal(found[4], rows[4])
