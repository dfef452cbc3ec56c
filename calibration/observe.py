"""Watching the PyTorch reference: what goes into each linear layer of its blocks, while it runs as it always does."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..export.families import modules_of
from ..export.reference.reference import Reference
from ..runtime.chain.plan import StepPlan
from ..runtime.chain.pyramid import Stage
from ..runtime.errors import CheckFailed
from ..runtime.ranges import output_of
from .statistics import Place, Seen, Sizes, Statistics

__all__ = ["Observer", "frame_groups", "in_pieces", "observed", "observed_decoder"]

FEED_FORWARD_BYTES = 64 * 2**20
"""Most that the hidden activation of a feed-forward takes: it runs in pieces of so many tokens."""


def frame_groups(stages: Sequence[Stage]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Names of the frame groups, and of each stage the tokens at which they begin, and its number of tokens.

    All are one group where a patch is so long that a group of some stage has no token of its own.
    """
    bounds = []
    for stage in stages:
        length, frame = stage.patch_size[0], stage.grid[1] * stage.grid[2]
        bounds.append((*(-(-group.start // length) * frame for group in stage.groups), stage.tokens))
    if any(start >= stop for found in bounds for start, stop in pairwise(found)):
        return ("all",), [(0, stage.tokens) for stage in stages]
    return tuple(group.name for group in stages[0].groups), bounds


class Observer:
    """Statistics of layers, filled by hooks on the modules that it is told of."""

    def __init__(self, sizes: Sizes, bounds: Sequence[tuple[int, ...]]) -> None:
        """Begin with none.

        Args:
            sizes: of the run.
            bounds: token bounds of each stage's frame groups: see `frame_groups`.
        """
        self.sizes, self.bounds, self.seen = sizes, bounds, Seen()
        self.place = Place(0, 0, 0)
        self.start = 0
        """Number of the first token that a layer is given, where a block runs in pieces."""
        self._beside: list[weakref.ref[torch.Tensor]] = []
        self._last: tuple[weakref.ref[torch.Tensor], str] | None = None

    def at(self, step: StepPlan, *, unconditional: bool) -> None:
        """What is seen from now on belongs to an evaluation; chunks have their steps in common."""
        self.place = Place(step.stage.index, step.index % self.sizes.steps, int(unconditional))

    def enter(self, block: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A block begins: what it is given beside the residual stream has no frames."""
        given = [*arguments[1:], *named.values()]
        self._beside = [weakref.ref(value) for value in given if isinstance(value, torch.Tensor)]

    def see(self, layer: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """A layer is given its input [1, tokens, in]; layers that are given the same one share its statistics."""
        values = inputs[0]
        if self._last is not None and self._last[0]() is values:
            self.seen.owners[layer] = self._last[1]
            return
        self._last, self.seen.owners[layer] = (weakref.ref(values), layer), layer
        text = any(value() is values for value in self._beside)
        # One group has all tokens, also those of a history, which no stage counts.
        whole = text or len(self.bounds[self.place.stage]) == 2
        bounds = (0, values.shape[1]) if whole else self.bounds[self.place.stage]
        if layer not in self.seen.inputs:
            self.seen.inputs[layer] = Statistics.begin(self.sizes, len(bounds) - 1, values.shape[2])
        statistics, start = self.seen.inputs[layer], 0 if whole else self.start
        for group, (first, end) in enumerate(pairwise(bounds)):
            rows = values[0, max(first - start, 0) : max(end - start, 0)]
            statistics.see(self.place, group, rows.numpy())
        if not statistics.finite:
            raise CheckFailed(
                f"the input of layer '{layer}' at stage {self.place.stage} is not finite: the weights or the "
                "embeddings are damaged; run parity"
            )

    def see_frames(self, layer: str, values: torch.Tensor) -> None:
        """Something of the decoder, [n, C, (T,) H, W]: a decoder knows of no stage and no step."""
        if layer not in self.seen.inputs:
            one = Sizes(1, self.sizes.passes, self.sizes.steps)
            self.seen.inputs[layer], self.seen.owners[layer] = Statistics.begin(one, 1, values.shape[1]), layer
        place = Place(0, self.sizes.steps - 1, 0)
        for clip in values.flatten(3 if values.ndim == 5 else 2).unbind(0):
            for frame in clip.unbind(1) if clip.ndim == 3 else [clip]:
                self.seen.inputs[layer].see(place, 0, frame.T.numpy())
        if not self.seen.inputs[layer].finite:
            raise CheckFailed(f"'{layer}' of the decoder is not finite: its weights are damaged; run parity")


@contextmanager
def observed_decoder(reference: Reference, observer: Observer) -> Iterator[None]:
    """Meanwhile, the reference's decoder tells an observer what its convolutions are given, and what they make."""
    checkpoint, decoder = reference.checkpoint, reference.decoder("vae")
    with ExitStack() as undone:
        for name in modules_of(checkpoint.model.family).block_matrices(checkpoint, "vae"):

            def see(module: Any, inputs: Any, output: torch.Tensor, layer: str = name) -> None:
                observer.see_frames(layer, inputs[0])
                observer.see_frames(output_of(layer), output)

            undone.callback(decoder.get_submodule(name).register_forward_hook(see).remove)
        yield


@contextmanager
def observed(reference: Reference, observer: Observer) -> Iterator[None]:
    """Meanwhile, the reference's blocks tell an observer what their layers are given, and run in pieces of tokens."""
    checkpoint = reference.checkpoint
    with ExitStack() as undone:
        for stage in dict.fromkeys(reference.stages):
            names = {module: name.removeprefix("transformer.") for name, module in stage.named_modules()}
            for block in modules_of(checkpoint.model.family).blocks(stage):
                undone.callback(block.register_forward_pre_hook(observer.enter, with_kwargs=True).remove)
                undone.enter_context(in_pieces(block, partial(setattr, observer, "start")))
                for layer in (module for module in block.modules() if isinstance(module, nn.Linear)):
                    name = names[layer]
                    assert f"{name}.weight" in checkpoint.transformer, name
                    undone.callback(layer.register_forward_pre_hook(partial(observer.see, name)).remove)
        yield


@contextmanager
def in_pieces(block: Any, begin: Callable[[int], object]) -> Iterator[None]:
    """The feed-forward of a block in pieces of tokens: each token has its own result, so sums alone may differ.

    Args:
        block: of a reference.
        begin: told the first token of each piece, and 0 after the last.
    """
    whole = block.ffn.forward
    widest = max(layer.out_features for layer in block.ffn.modules() if isinstance(layer, nn.Linear))
    most = max(1, FEED_FORWARD_BYTES // (4 * widest))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] <= most:
            result: torch.Tensor = whole(tokens)
            return result
        out = torch.empty_like(tokens)
        for start in range(0, tokens.shape[1], most):
            begin(start)
            out[:, start : start + most] = whole(tokens[:, start : start + most])
        begin(0)
        return out

    block.ffn.forward = forward
    try:
        yield
    finally:
        del block.ffn.forward
