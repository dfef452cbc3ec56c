"""Building blocks for the tensor processor, against the plain ones."""

import pytest
import torch
from pyrexport.export.weights.calibrated import Bounds
from pyrexport.runtime.model.safetensors import TensorEntry
from pyrexport.targets import dialect as shared
from pyrexport.targets.dialect import Dialect
from pyrexport.targets.qnn import dialect
from pyrexport.targets.qnn.dialect import HEXAGON
from pyrexport.targets.qnn.operators import rounded_input, rounded_output


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_rotation_is_that_of_pairs(draw):
    x = torch.randn(1, 7, 3 * 8, generator=draw)
    cos, sin = (torch.randn(7, 4, generator=draw) for _ in range(2))
    expected = Dialect().rotation(3, 8)(x, cos, sin)
    torch.testing.assert_close(HEXAGON.rotation(3, 8)(x, cos, sin), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("room", [10**9, 3 * 40 * 2, 40])
def test_blocks_of_queries_make_the_same_attention(draw, monkeypatch, room):
    """All at once, three queries of a head at a time, and more blocks than are allowed."""
    monkeypatch.setattr(dialect, "SCORES_BYTES", room)
    monkeypatch.setattr(dialect, "MOST_BLOCKS", 5)
    q, k, v = (torch.randn(1, n, 2 * 8, generator=draw) for n in (21, 40, 40))
    expected = Dialect().attention(q, k, v, 2)
    torch.testing.assert_close(HEXAGON.attention(q, k, v, 2), expected, rtol=1e-5, atol=1e-6)


def test_no_block_holds_more_scores_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(dialect, "SCORES_BYTES", 2 * 100 * 7)
    q, k, v = (torch.zeros(1, 100, 2 * 8) for _ in range(3))
    found: list[int] = []
    attend = shared._attend
    monkeypatch.setattr(shared, "_attend", lambda q, k, v: found.append(q.shape[0] * q.shape[1]) or attend(q, k, v))
    HEXAGON.attention(q, k, v, 2)
    assert max(found) <= 7
    assert sum(found) == 200


def test_16_bits_hold_the_range_of_8_exactly():
    scale, zero = torch.tensor(0.125), torch.tensor(37, dtype=torch.uint8)
    ends = torch.tensor([-37 * 0.125, (255 - 37) * 0.125])
    torch.testing.assert_close(rounded_input(ends, scale, zero), ends, rtol=0, atol=0)
    beyond = rounded_input(torch.tensor([-100.0, 100.0]), scale, zero)
    torch.testing.assert_close(beyond, ends, rtol=1e-6, atol=0)
    x = torch.linspace(float(ends[0]), float(ends[1]), 1000)
    assert (rounded_input(x, scale, zero) - x).abs().max() <= 0.125 / 257 / 2 * 1.01


def test_no_product_leaves_its_bound(draw, tmp_path):
    """Each channel of the input at the end that the weight's sign asks for reaches it."""
    weight = torch.randn(6, 10, generator=draw)
    lowest, highest = -torch.rand(2, 3, 10, generator=draw), 2 * torch.rand(2, 3, 10, generator=draw)
    entries = {}
    for name, values in (("lowest", lowest), ("highest", highest)):
        file = tmp_path / name
        file.write_bytes(values.numpy().tobytes())
        entries[name] = TensorEntry(file, name, "float32", tuple(values.shape), 0)
    (bound,) = Bounds(entries["lowest"], entries["highest"], 1).apply(weight, 0)
    greatest = torch.maximum(-lowest[1].amin(0), highest[1].amax(0))
    torch.testing.assert_close(bound, (weight.sign() * greatest * weight).sum(1))
    torch.testing.assert_close(rounded_output(bound, bound), bound, rtol=0, atol=float(bound.max()) / 32767)
