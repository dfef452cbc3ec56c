"""What the targets that run on ONNX Runtime share: a session of one graph, NumPy in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..runtime.bundle.engines import check_inputs
from ..runtime.bundle.graphs import GraphSpec
from ..runtime.bundle.manifest import WEIGHTS_FILE
from ..runtime.dtypes import DTYPES
from ..runtime.errors import CheckFailed, UsageError
from .links import relocated
from .quiet import line_of

__all__ = ["Session", "open_mapped"]

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""The setting that says where the weights of a model lie that is no file."""


def open_mapped(
    file: Path, settings: ort.SessionOptions, model: bytes | None = None, **how: Any
) -> ort.InferenceSession:
    """A session of a graph whose weights lie beside it, also where these are a link, as in the hub's cache.

    Args:
        file: the graph's file.
        settings: of the session.
        model: the graph itself, where the file is none.
        how: as `InferenceSession` takes it.
    """
    weights = file.parent / WEIGHTS_FILE
    if weights.is_symlink():
        resolved = weights.resolve()
        model, weights = relocated(model or file.read_bytes(), {WEIGHTS_FILE: resolved.name}), resolved
    if model is not None:
        settings.add_session_config_entry(WEIGHTS_FOLDER, str(weights.parent.resolve()))
    return ort.InferenceSession(model or str(file), settings, **how)


class Session:
    """One graph, loaded."""

    engine = f"onnxruntime {ort.__version__}"
    """Who is to blame in messages."""

    def __init__(self, name: str, spec: GraphSpec, session: ort.InferenceSession) -> None:
        """Take a session.

        Raises:
            UsageError: it is not the graph of its specification.
        """
        self.name, self.spec, self.session = name, spec, session
        self.outputs = [value.name for value in session.get_outputs()]
        for kind, values, specs in (
            ("inputs", session.get_inputs(), spec.inputs),
            ("outputs", session.get_outputs(), spec.outputs),
        ):
            found = {value.name: (value.type, *value.shape) for value in values}
            wanted = {each.name: (f"tensor({DTYPES[each.dtype].onnx})", *each.shape) for each in specs}
            if found != wanted:
                raise UsageError(
                    f"{name} is not the graph of its manifest: expected {kind} {wanted}, found {found}"[:400]
                )

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluate the graph.

        Raises:
            UsageError: an input is missing, extra, or of another shape or dtype.
            CheckFailed: the engine fails in it: no memory is left, or the graph is damaged.
        """
        check_inputs(self.spec.inputs, inputs)
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            values = self.session.run(None, arrays)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise CheckFailed(f"{self.engine} failed in {self.name}: {line_of(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        """Free the session and its mappings."""
        del self.session
