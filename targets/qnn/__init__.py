"""Qualcomm's Hexagon tensor processor. The entry point `qnn` of the group `pyrexport.targets` names `TARGET`."""

from .target import Qnn

__all__ = ["TARGET"]

TARGET = Qnn()
