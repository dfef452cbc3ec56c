"""How graphs are written for XNNPACK."""

import operator

import pytest
import torch
from executorch.exir.delegate import executorch_call_delegate
from pyrexport.targets.executorch import dialect
from pyrexport.targets.executorch.dialect import PORTABLE
from pyrexport.targets.executorch.lowering import lower
from pyrexport.targets.ort.dialect import FUSED


def test_the_portable_dialect_is_exact():
    """Against PyTorch's own functions; 2e-6 is a few roundings of float32."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 24, 48), torch.randn(48), torch.randn(48)

    def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)

    same(PORTABLE.layer_norm(48, 1e-6)(x, weight, bias), torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-6))
    same(PORTABLE.rms_norm(48, 1e-6)(x, weight), torch.nn.functional.rms_norm(x, (48,), weight, 1e-6))
    same(PORTABLE.gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))
    image = torch.randn(2, 6, 4, 5)
    same(PORTABLE.channel_mean(6)(image), image.mean(1, keepdim=True))
    assert torch.equal(PORTABLE.doubling()(image), torch.nn.functional.interpolate(image, scale_factor=2.0))
    angle = torch.randn(24, 6)
    turned = FUSED.rotation(4, 12)(x, angle.cos(), angle.sin())
    same(PORTABLE.rotation(4, 12)(x, angle.cos(), angle.sin()), turned)
    buckets, table = torch.randint(0, 5, (7, 7)), torch.randn(5, 3)
    length = buckets.shape[0]
    assert torch.equal(PORTABLE.bucket_bias(buckets, 5)(table, length), FUSED.bucket_bias(buckets, 5)(table, length))


@pytest.mark.parametrize("tokens", [24, 23])
def test_attention_in_pieces_is_the_same(monkeypatch, tokens):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 48), torch.randn(1, 31, 48), torch.randn(1, 31, 48)
    wanted = FUSED.attention(q, k, v, 4)
    torch.testing.assert_close(PORTABLE.attention(q, k, v, 4), wanted, rtol=2e-6, atol=2e-6)
    for nbytes in (31 * 4 * 24, 31 * 4 * 5, 1):
        monkeypatch.setattr(dialect, "SCORES_BYTES", nbytes)
        torch.testing.assert_close(PORTABLE.attention(q, k, v, 4), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("heads", "nbytes"), [(4, 31 * 4 * 24), (1, 31 * 4 * 5)])
def test_what_is_one_piece_is_not_cut(monkeypatch, heads, nbytes):
    """A cut that leaves all would be a copy between two delegates: blocks whose heads fit one by one had twelve."""
    monkeypatch.setattr(dialect, "SCORES_BYTES", nbytes)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return PORTABLE.attention(q + q, k, v, heads)

    program = torch.export.export(Attention(), (torch.randn(1, 24, 48), torch.randn(1, 31, 48), torch.randn(1, 31, 48)))
    calls = [node for node in lower("attention", program).graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [executorch_call_delegate, operator.getitem]
