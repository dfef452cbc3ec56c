"""Helios in PyTorch: the graphs of its stages, and its reference."""

from .family import HELIOS_MODULES

__all__ = ["HELIOS_MODULES"]
