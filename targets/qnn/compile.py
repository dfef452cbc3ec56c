"""Compile networks for one chip: `python -m pyrexport.targets.qnn.compile < request`, in a process of its own.

The compiler may take gigabytes, and may end the process. The request is JSON: `folder` and the `networks` in it, the
folder of the `contexts` (`NAME.ctx.onnx`, and what these refer to), `chip`, `finalisation`, `shared`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..quiet import line_of
from .chips import CHIPS
from .provider import settings_for

__all__ = ["CONTEXT", "compile_networks"]

CONTEXT = ".ctx.onnx"
"""End of the name of a compiled network."""


def compile_networks(request: dict[str, Any]) -> None:
    """Compile each network; where weights are shared, the last one's session writes those of all."""
    folder, contexts, names = Path(request["folder"]), Path(request["contexts"]), request["networks"]
    sessions = []
    for name in names:
        settings = settings_for(CHIPS[request["chip"]], request["finalisation"], request["shared"])
        settings.add_session_config_entry("ep.context_enable", "1")
        settings.add_session_config_entry("ep.context_file_path", str(contexts / f"{name}{CONTEXT}"))
        settings.add_session_config_entry("ep.context_embed_mode", "0")
        if request["shared"] and name == names[-1]:
            settings.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        try:
            session = ort.InferenceSession(str(folder / f"{name}.onnx"), settings, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise SystemExit(f"{name}: {line_of(error)}") from error
        if request["shared"]:
            sessions.append(session)


if __name__ == "__main__":
    compile_networks(json.load(sys.stdin))
