"""ONNX Runtime. The entry point `ort` of the group `pyrexport.targets` names `TARGET`."""

from .target import Ort

__all__ = ["TARGET"]

TARGET = Ort()
