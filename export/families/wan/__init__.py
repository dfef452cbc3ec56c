"""Wan's modules: transformer, VAE and text encoder."""

from .family import WAN_MODULES

__all__ = ["WAN_MODULES"]
