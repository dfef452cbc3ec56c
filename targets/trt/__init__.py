"""TensorRT and TensorRT for RTX. The entry point `trt` of the group `pyrexport.targets` names `TARGET`."""

from .target import Trt

__all__ = ["TARGET"]

TARGET = Trt()
