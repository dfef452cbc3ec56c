"""PyTorch's tracing without what only people would read: the Python of graphs, and the lines that nodes came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen

__all__ = ["lean_tracing"]


@contextmanager
def lean_tracing() -> Iterator[None]:
    """While it lasts, a graph becomes Python when it is called, and nodes have no stack traces: a fourth of the time.

    Each of dozens of passes would generate and compile the Python of its graph, which next to none calls.
    """
    settings, graphs = vars(fx.config), fx.GraphModule
    traces, recompile = settings.get("do_not_emit_stack_traces", False), graphs.recompile
    settings["do_not_emit_stack_traces"] = True  # without effect before PyTorch knew it
    setattr(graphs, "recompile", _compiling_when_called(recompile))  # noqa: B010
    try:
        yield
    finally:
        settings["do_not_emit_stack_traces"] = traces
        setattr(graphs, "recompile", recompile)  # noqa: B010


def _compiling_when_called(compiled: Any) -> Any:
    def recompile(module: Any) -> None:
        codegen = module.graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        module._code, kind = "", type(module)  # of which this module is the only one
        kind.forward, kind.__call__ = forward, nn.Module.__call__
        module._recompile_submodules()

    def forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        compiled(module)
        made: torch.Tensor = module.forward(*args, **kwargs)
        return made

    return recompile
