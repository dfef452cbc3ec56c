"""Memory of a method before it is lowered: counted by hand, and against runs."""

import json

import pytest
import torch
from pyrexport.runtime.bundle.graphs import GraphSpec, TensorSpec, stage_key
from pyrexport.targets.executorch.memory import peak_bytes
from pyrexport.targets.executorch.target import Executorch
from pyrexport.targets.forms import TorchForm
from torch import nn

pytest.importorskip("executorch")

MIB = 2**20


class Fork(nn.Module):
    """A value that is used twice, so that two products stand beside it; their sum takes the place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = (nn.Parameter(torch.zeros(512, 512), requires_grad=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.one
        return ((y @ self.other) + (y @ self.other)) @ self.last


class Kernel(nn.Module):
    """A convolution of nine taps, and one of a single tap, which needs no table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv2d(x, torch.zeros(4, 4, 3, 3), padding=1)
        return nn.functional.conv2d(y, torch.zeros(4, 4, 1, 1))


def form_of(module: nn.Module, shape: tuple[int, ...]) -> TorchForm:
    """A form without weights in a file."""
    program = torch.export.export(module, (torch.zeros(shape),))
    output = tuple(program.graph.output_node().args[0][0].meta["val"].shape)
    spec = GraphSpec(stage_key(0), (TensorSpec("x", shape),), (TensorSpec("y", output),))
    return TorchForm("stage0", program, {}, None, (spec,))


def test_values_that_live_at_once_are_counted():
    """512 x 512 float32 are 1 MiB: the input, the output, and the three that meet."""
    assert peak_bytes(form_of(Fork(), (512, 512))) == 5 * MIB


def test_convolutions_keep_a_pointer_for_each_pixel_and_tap():
    """Input, output and what is between are [1, 4, 64, 64] of 64 KiB; nine taps of 4,096 pixels have 8 bytes each."""
    assert peak_bytes(form_of(Kernel(), (1, 4, 64, 64))) == 3 * 65536 + 4096 * 9 * 8


@pytest.mark.slow
def test_the_plan_is_what_a_run_takes(built, tiny, cli):
    """Within 15 % of what each method took in a process of its own, and a MiB for what that process allocates."""
    planned = cli("build", tiny, "--target", "executorch", "--plan", "--resolution", "17x64x64", "--json", "--quiet")
    assert planned.exit_code == 0, planned.output
    expected = json.loads(planned.stdout)["resolutions"]["17x64x64"]["peak_anonymous_bytes"]
    found = json.loads(cli("inspect", built.folder, "--json").stdout)["peak_anonymous_bytes"]
    assert expected.keys() == found.keys()
    process = Executorch.process_bytes
    for name, peak in found.items():
        assert expected[name] - process == pytest.approx(peak - process, rel=0.15, abs=MIB), name
