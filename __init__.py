"""pyrexport: export trained pyramidal video diffusion models, and prove that they still compute the same."""

from .runtime.errors import CheckFailed, PyrexportError, UsageError

__all__ = ["CheckFailed", "PyrexportError", "UsageError", "__version__"]

__version__ = "0.1.0"
