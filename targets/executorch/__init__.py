"""ExecuTorch. The entry point `executorch` of the group `pyrexport.targets` names `TARGET`."""

from .target import Executorch

__all__ = ["TARGET"]

TARGET = Executorch()
