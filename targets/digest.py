"""What tells one network from another: its nodes, its weights, and the shapes that it is built for."""

import hashlib

import numpy as np
import onnx_ir as ir

from .external import refer
from .forms import OnnxForm

__all__ = ["network_bytes", "network_digest"]


def network_bytes(form: OnnxForm) -> bytes:
    """The network as ONNX, its weights references into their file."""
    refer(form.model, form.placements, form.weights)
    data: bytes = ir.to_proto(form.model).SerializeToString(deterministic=True)
    return data


def network_digest(form: OnnxForm) -> str:
    """SHA-256 of the network, its weights, and the shapes that it is built for."""
    digest = hashlib.sha256(network_bytes(form))
    weights = np.memmap(form.weights, np.uint8, "r") if form.placements else np.zeros(0, np.uint8)
    for place in sorted(form.placements.values(), key=lambda place: place.offset):
        digest.update(memoryview(weights[place.offset : place.offset + place.nbytes]))  # type: ignore[arg-type]
    digest.update(repr([spec.inputs for spec in form.graphs]).encode())
    return digest.hexdigest()
