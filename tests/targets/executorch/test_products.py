"""Products of integers in an ExecuTorch program, against float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyrexport.runtime.bundle.engines import EngineOptions
from pyrexport.runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from pyrexport.runtime.quantisation import SCHEMES, Scheme
from pyrexport.targets.executorch.dialect import PORTABLE
from torch import nn

pytest.importorskip("executorch")

from executorch.exir import ExecutorchBackendConfig
from pyrexport.export.weights.quantising import block_step, channel_step
from pyrexport.targets.executorch.lowering import lower, merge
from pyrexport.targets.executorch.session import ExecutorchEngine

pytestmark = pytest.mark.usefixtures("library")

TOKENS, INPUTS, OUTPUTS = 5, 64, 24


class Product(nn.Module):
    """A product of integers, and its bias."""

    def __init__(self, scheme: Scheme, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        made = block_step(scheme) if scheme.block else channel_step(scheme, transposed=False)
        values, scales = made.apply(weight, 0)
        self.values, self.scales, self.bias = (nn.Parameter(each, False) for each in (values, scales, bias))
        self.scheme = scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.block:
            return PORTABLE.block_product(x, self.values, self.scales, self.bias, self.scheme)
        return PORTABLE.integer_product(x, self.values, self.scales, self.bias)

    def weight(self) -> NDArray[np.float64]:
        """What its integers stand for."""
        values, scales = self.values.numpy(), self.scales.double().numpy()
        if self.scheme.block:
            nibbles = np.stack((values & 15, values >> 4), axis=-1).reshape(OUTPUTS, -1, self.scheme.block)
            return ((nibbles.astype(np.float64) - 8) * scales.reshape(OUTPUTS, -1, 1)).reshape(OUTPUTS, -1)
        return values * scales[:, None]


def by_tokens(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row rounded to 255 steps from its least to its greatest value, zero among them."""
    low, high = np.minimum(x.min(axis=-1, keepdims=True), 0), np.maximum(x.max(axis=-1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.round(-128 - low / scale)
    return (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale


def run(
    module: nn.Module, x: torch.Tensor, shape: tuple[int, ...], folder: Path
) -> tuple[list[str], NDArray[np.float32]]:
    """What a module of one input is lowered to, and its output, of the same dtype, by the session."""
    dtype = str(x.dtype).removeprefix("torch.")
    spec = GraphSpec(stage_key(0), (TensorSpec("x", tuple(x.shape), dtype),), (TensorSpec("y", shape, dtype),))
    lowered = lower(spec.name, torch.export.export(module.eval(), (x,), strict=False))
    with (folder / "module.pte").open("wb") as out:
        merge({spec.name: lowered}).to_executorch(ExecutorchBackendConfig()).write_to_file(out)
    engine = ExecutorchEngine(folder / "module.pte", spec, EngineOptions())
    found = engine.run({"x": x.numpy()})["y"]
    engine.close()
    return [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"], found


@pytest.mark.parametrize("method", ["w8a8-dynamic", "w4a8"])
def test_the_engine_computes_in_the_integers_that_are_stored(tmp_path: Path, method: str) -> None:
    """1e-3 of a step's 1/255: a value that lies between two integers may be rounded to either."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(OUTPUTS, INPUTS, generator=draw), torch.randn(OUTPUTS, generator=draw)
    weight[3] = 0
    module = Product(SCHEMES[method], weight, bias)
    x = torch.randn(1, TOKENS, INPUTS, generator=draw) * torch.tensor([1e-3, 1, 5, 70, 1e4]).view(-1, 1)
    calls, found = run(module, x, (1, TOKENS, OUTPUTS), tmp_path)
    assert calls == ["executorch_call_delegate", "<built-in function getitem>"]
    exact = by_tokens(x.double().numpy()) @ module.weight().T
    error = np.linalg.norm(found - bias.numpy() - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert error.max() < 1e-3, error
    plain = x.double().numpy() @ module.weight().T
    assert (np.linalg.norm(plain - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).min() > 3e-3


def test_what_is_kept_in_16_bits_is_cast_outside_of_xnnpack(tmp_path: Path) -> None:
    """As a decoder's caches are; its arithmetic is float32, where 65504 + 65504 does not overflow."""

    class Kept(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return ((wide + wide) * 0.25).half()

    x = torch.tensor([[1.0, -2.5, 65504.0]], dtype=torch.float16)
    calls, found = run(Kept(), x, (1, 3), tmp_path)
    assert calls.count("executorch_call_delegate") == 1
    assert sum("_to_dim_order_copy" in call for call in calls) == 2
    np.testing.assert_array_equal(found, (x.float() / 2).half().numpy())
