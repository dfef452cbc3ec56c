"""pyrexport: export trained pyramidal video diffusion models, and prove that they still compute the same.

>>> pipeline = pyrexport.load("wan.pyrx")  # doctest: +SKIP
>>> video = pipeline("a cat", seed=0).frames  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from .runtime.errors import CheckFailed, PyrexportError, UsageError

if TYPE_CHECKING:
    from .export.bundle.build import build
    from .runtime.pipeline.pipeline import Pipeline, load

__all__ = ["CheckFailed", "Pipeline", "PyrexportError", "UsageError", "__version__", "build", "load"]

__version__ = "0.2.0"

_LAZY = {
    "Pipeline": ".runtime.pipeline.pipeline",
    "build": ".export.bundle.build",
    "load": ".runtime.pipeline.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pyrexport' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
