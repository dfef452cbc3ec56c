"""What the integers of layers' inputs hold: the constants of a bundle's graphs against the ranges of its manifest."""

import math
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from ...runtime.bundle.graphs import FIRST, STAGE, GraphKey
from ...runtime.bundle.opening import Bundle
from ...runtime.proof.metrics import finite
from ...runtime.ranges import output_of
from ..families import modules_of
from .layers import constant, holds_models, layer_nodes, stage_model

__all__ = ["range_errors"]

Interval = tuple[float, float]

DECODER = "decoder."
"""What the names of a decoder's layers begin with."""

EXPANDED = ("MatMul", "DequantizeLinear")
"""Between a bias and the integers, where a product is written in operators of the standard."""

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
    decoded = {name for name in ranges if name.startswith(DECODER)}
    for key in bundle.manifest.graphs:
        if key.component == "vae" and decoded:
            yield from _decoder_errors(bundle, key, decoded)
        if key.role == STAGE:
            model = stage_model(bundle, key)
            for layer in dict.fromkeys((*layers, *(name for name in ranges if name not in decoded))):
                expected = ranges[layer][key.stage] if layer in ranges else None
                found = [_interval(node) for node in layer_nodes(model, layers.get(layer, layer))] or [None]
                yield max(_deviation(interval, expected) for interval in found), key.stage, layer


def _decoder_errors(bundle: Bundle, key: GraphKey, names: set[str]) -> Iterator[tuple[float, int, str]]:
    """Those of the decoder's convolutions and their outputs; it knows of no stage, and counts as the finest."""
    model, family = ir.load(bundle.file(bundle.manifest.graphs[key].file)), modules_of(bundle.manifest.model.family)
    constants = model.graph.initializers
    places = set()
    for name in names:
        layer = name.removesuffix(output_of(""))
        kind = "" if layer == name else "output_"
        place = f"{family.decoder_layer(bundle.manifest.model, layer)}.{kind}"
        places.add(f"{place}scale")
        scale, zero = (constants.get(f"{place}{which}") for which in ("scale", "zero"))
        if scale is None and key.role == FIRST:
            continue  # what doubles frames has nothing to do in the first one
        found = None if scale is None or zero is None else _held(scale, zero)
        yield _deviation(found, bundle.manifest.ranges[name][0]), 0, name
    for place in constants:
        if place.endswith("scale") and place not in places:
            yield math.inf, 0, place


def _deviation(found: Interval | None, expected: Interval | None) -> float:
    """Of an end, relative to the length of what is expected; infinite where one of the two is missing."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    low, high = expected
    return max(abs(found[0] - low), abs(found[1] - high)) / (high - low)


def _interval(node: ir.Node) -> Interval | None:
    """What the integers of a product's input hold; None where they have no constants of their own."""
    rounded = _before(node)
    while rounded is not None and rounded.op_type in EXPANDED:
        rounded = _before(rounded)
    if rounded is None or rounded.op_type != "QuantizeLinear":
        return None
    return _held(*rounded.inputs[1:3])


def _before(node: ir.Node) -> ir.Node | None:
    """What makes the first input of a node."""
    given = node.inputs[0]
    return None if given is None else given.producer()


def _held(scale: ir.Value | None, zero: ir.Value | None) -> Interval:
    step, middle = _constant(scale), _constant(zero)
    return -middle * step, (GREATEST - middle) * step


def _constant(value: ir.Value | None) -> float:
    assert value is not None
    return math.nan if value.const_value is None else float(constant(value))
