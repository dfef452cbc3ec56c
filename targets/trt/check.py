"""What a build's log says of an engine: that it is the fast and small one that was asked for."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.errors import CheckFailed
from ..forms import OnnxForm

__all__ = ["BuildLog", "Report", "check_engine", "join_reports"]

PRODUCTS = {"MatMul", "Gemm", "Conv"}
ATTENTION_KERNEL = re.compile(r"Name: _*(?:gemm_mha|fmha|mha)")
EIGHT_BITS = re.compile(r"LayerType: gemm, Inputs: \[ \{[^}]*Datatype: (?:Int8|FP8)")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+?)(?: \[profile \d+\])?\]")
PROFILE = re.compile(r"_myl(\d+)_\d+$|\[profile (\d+)\]")
WEIGHTS_ONCE = 1.1
"""Most that the engine's weights may take by those of the network: small constants and padding lie beside them."""


@dataclass
class BuildLog:
    """The lines of a verbose log that say what became of each layer, and its sums."""

    layers: list[str] = field(default_factory=list)
    activation_bytes: list[int] = field(default_factory=list)
    """Device memory beside weights, of each profile."""
    weights_bytes: int = 0
    errors: list[str] = field(default_factory=list)

    def read(self, message: str) -> None:
        """Take in a message."""
        if "LayerType: " in message:
            self.layers.extend(line for line in message.splitlines() if "LayerType: " in line)
        elif message.startswith("Total Activation Memory: "):
            self.activation_bytes.append(int(message.split()[3]))
        elif message.startswith("Total Weights Memory: "):
            self.weights_bytes = int(message.split()[3])


@dataclass(frozen=True)
class Report:
    """What was found of one graph."""

    line: str
    facts: dict[str, Any]


def check_engine(form: OnnxForm, log: BuildLog) -> dict[str, Report]:
    """Check that attention is fused in every profile, that nothing scatters, that every product is in the engine, and
    that weights are stored once.

    Returns:
        A report for each graph, by its name.

    Raises:
        CheckFailed: one of it does not hold; the message names the layer.
    """
    if not log.layers:
        raise CheckFailed(
            f"{form.name}: the build's log names no layers, so that the engine cannot be checked: {_REPORT}"
        )
    _check_scatter(form, log)
    products, rounded = _check_products(form, log), _check_rounded(form, log)
    attention, fused = _check_attention(form, log)
    weights = sum(place.nbytes for place in form.placements.values())
    if log.weights_bytes > WEIGHTS_ONCE * weights + 2**22:
        raise CheckFailed(
            f"{form.name}: expected {weights:,} bytes of weights, the engine holds {log.weights_bytes:,}: {_REPORT}"
        )
    reports = {}
    for index, graph in enumerate(form.graphs):
        facts = {
            "attention": attention,
            "fused_attention": fused,
            "products": products,
            "rounded_products": rounded,
            "weights_bytes": log.weights_bytes,
            "activation_bytes": log.activation_bytes[index] if index < len(log.activation_bytes) else None,
        }
        reports[graph.name] = Report(_line(facts), facts)
    return reports


def join_reports(parts: Sequence[Mapping[str, Report]]) -> dict[str, Report]:
    """What was found of each graph in all engines that it is cut into, which share their device memory."""
    joined = {}
    for name in parts[0]:
        found = [part[name].facts for part in parts]
        facts = {fact: sum(each[fact] for each in found) for fact in found[0] if fact != "activation_bytes"}
        sizes = [each["activation_bytes"] for each in found]
        facts["activation_bytes"] = None if None in sizes else max(sizes)
        joined[name] = Report(_line(facts), facts)
    return joined


def _check_scatter(form: OnnxForm, log: BuildLog) -> None:
    scatter = [str(node.name) for node in form.model.graph if node.op_type.startswith("Scatter")]
    scatter += [line for line in log.layers if "scatter" in line.split(",")[0].lower()]
    if scatter:
        raise CheckFailed(f"{form.name}: expected no scatter, found '{scatter[0][:80]}', which is slow: {_REPORT}")


def _check_products(form: OnnxForm, log: BuildLog) -> int:
    """How many matrix products there are, all of them inside."""
    inside = _profiles(log.layers)
    products = [str(node.name) for node in form.model.graph if node.op_type in PRODUCTS]
    outside = next((name for name in products if len(inside[name]) < len(form.graphs)), None)
    if outside is not None:
        raise CheckFailed(
            f"{form.name}: the matrix product '{outside}' is not in every profile of the engine: {_REPORT}"
        )
    return len(products)


def _check_rounded(form: OnnxForm, log: BuildLog) -> int:
    """How many products are of integers, or floats of 8 bits: their kernels take these in every profile."""
    inside = _profiles(line for line in log.layers if EIGHT_BITS.search(line))
    rounded = [str(node.name) for node in form.model.graph if node.op_type in PRODUCTS and _is_rounded(node)]
    wide = next((name for name in rounded if len(inside[name]) < len(form.graphs)), None)
    if wide is not None:
        raise CheckFailed(f"{form.name}: the product '{wide}' is not of 8 bits in every profile: {_REPORT}")
    return len(rounded)


def _is_rounded(node: Any) -> bool:
    """Whether a product's input is rounded to 8 bits."""
    given = node.inputs[0].producer()
    return given is not None and given.op_type == "DequantizeLinear"


def _check_attention(form: OnnxForm, log: BuildLog) -> tuple[int, int]:
    """How many attentions there are, and how many of them are fused in every profile: all in 16 bits."""
    fused = _profiles(line for line in log.layers if ATTENTION_KERNEL.match(line))
    attention = [node for node in form.model.graph if node.op_type == "Attention"]
    counts = [len(fused[str(node.name)]) for node in attention]
    for node, count in zip(attention, counts, strict=True):
        if count < len(form.graphs) and _is_short(node):
            raise CheckFailed(
                f"{form.name}: attention '{node.name}' is fused in {count} of {len(form.graphs)} profiles: TensorRT "
                "has no such kernel for every head size (16, 24, 64, 80 and 128 have one, 8 and 256 have none); "
                "--precision fp32 builds it unfused"
            )
    return len(attention), sum(count >= len(form.graphs) for count in counts)


_REPORT = "this version of TensorRT builds it otherwise than those that we tested; please report it"


def _profiles(layers: Iterable[str]) -> defaultdict[str, set[str]]:
    """The profiles in whose kernels each ONNX node is, as the kernels' names tell them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for line in layers:
        profile = PROFILE.search(line.split(",")[0])
        for name in ONNX_LAYER.findall(line):
            found[name].add((profile and (profile.group(1) or profile.group(2))) or "0")
    return found


def _is_short(node: Any) -> bool:
    """Whether an attention is one of 16 bits, which TensorRT fuses; it has no kernel for float32."""
    dtype = node.inputs[0].dtype
    return dtype is None or dtype.itemsize < 4


def _line(facts: dict[str, Any]) -> str:
    own = f", {facts['rounded_products']} of them in 8 bits" if facts["rounded_products"] else ""
    found = [f"{facts['products']} products inside{own}, no scatter"]
    if facts["attention"]:
        found.append(f"attention fused {facts['fused_attention']} of {facts['attention']}")
    if facts["activation_bytes"] is not None:
        found.append(f"activations {facts['activation_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(found)
