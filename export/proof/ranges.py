"""What the integers of layers' inputs hold: the constants of a bundle's graphs against the ranges of its manifest."""

import math
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from ...runtime.bundle.graphs import STAGE
from ...runtime.bundle.opening import Bundle
from ...runtime.proof.metrics import finite
from ..families import modules_of
from .layers import constant, holds_models, layer_nodes, stage_model

__all__ = ["range_errors"]

Interval = tuple[float, float]

GREATEST = 255
"""The integers of an input go from 0 to this."""


def range_errors(bundle: Bundle) -> dict[str, Any] | None:
    """How far the interval that a layer's integers hold is from the one that the manifest says, where it is furthest.

    Returns:
        `{"relative_error", "worst": {"stage", "layer"}}`: the greater deviation of an end by the interval's length.
        None where no input is rounded by constants, or the graphs are not ONNX files.
    """
    if not bundle.manifest.ranges or not holds_models(bundle):
        return None
    model = bundle.manifest.model
    blocks = modules_of(model.family).block_layers(model)
    layers = {name: own for block in blocks for name, own in block.items()}
    error, stage, layer = max(_errors(bundle, layers), key=lambda found: found[0])
    return {"relative_error": finite(error), "worst": {"stage": stage, "layer": layer}}


def _errors(bundle: Bundle, layers: dict[str, str]) -> Iterator[tuple[float, int, str]]:
    """Error, stage and layer of all stages and layers."""
    ranges = bundle.manifest.ranges
    for key in bundle.manifest.graphs:
        if key.role == STAGE:
            model = stage_model(bundle, key)
            for layer in dict.fromkeys((*layers, *ranges)):
                expected = ranges[layer][key.stage] if layer in ranges else None
                found = [_interval(node) for node in layer_nodes(model, layers.get(layer, layer))] or [None]
                yield max(_deviation(interval, expected) for interval in found), key.stage, layer


def _deviation(found: Interval | None, expected: Interval | None) -> float:
    """Of an end, relative to the length of what is expected; infinite where one of the two is missing."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    low, high = expected
    return max(abs(found[0] - low), abs(found[1] - high)) / (high - low)


def _interval(node: ir.Node) -> Interval | None:
    """What the integers of a product's input hold; None where they have no constants of their own."""
    given = node.inputs[0]
    rounded = None if given is None else given.producer()
    if rounded is None or rounded.op_type != "QuantizeLinear":
        return None
    scale, zero = (_constant(value) for value in rounded.inputs[1:3])
    return -zero * scale, (GREATEST - zero) * scale


def _constant(value: ir.Value | None) -> float:
    assert value is not None
    return math.nan if value.const_value is None else float(constant(value))
