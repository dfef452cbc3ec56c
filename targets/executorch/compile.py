"""The session's library, compiled from `shim.cpp` against the libraries and headers of the installed wheel."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ...runtime.errors import UsageError

__all__ = ["NoCompiler", "library_path"]

SOURCE = Path(__file__).with_name("shim.cpp")
LIBRARIES = ("executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")


class NoCompiler(Exception):
    """There is no C++ compiler."""


def library_path() -> Path:
    """The library, compiled if it is not there for this wheel and this compiler.

    It is kept in the user's cache folder, or in a temporary one where that cannot be written.

    Raises:
        NoCompiler: neither `$CXX`, g++, clang++ nor c++ is there.
        UsageError: executorch is not installed, or the compiler fails.
    """
    spec = find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("executorch is not installed: pip install executorch, or its wheel alone with --no-deps")
    wheel = Path(next(iter(spec.submodule_search_locations)))
    compiler = _compiler()
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(
        "\n".join([version("executorch"), str(wheel), told, SOURCE.read_text("utf-8")]).encode()
    ).hexdigest()
    name = f"executorch-{key[:16]}.so"
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cached = Path(root) / "pyrexport" / name
    if cached.is_file():
        return cached
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        if os.access(cached.parent, os.W_OK):
            return _compile(compiler, wheel, cached)
    return _compile(compiler, wheel, Path(tempfile.mkdtemp(prefix="pyrexport-")) / name)


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NoCompiler(f"no C++ compiler is here ({'$CXX is ' + chosen if chosen else 'g++, clang++ or c++'})")


def _compile(compiler: str, wheel: Path, output: Path) -> Path:
    """Compile beside and rename, so that another process never loads half a library."""
    handle, partial = tempfile.mkstemp(suffix=".so", dir=output.parent)
    os.close(handle)
    include = wheel / "include"
    command = [
        compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-w",
        "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED",
        f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10", str(SOURCE), "-o", partial,
        f"-L{wheel / 'lib'}", "-lexecutorch", "-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES),
        "-Wl,--as-needed", f"-Wl,-rpath,{wheel / 'lib'}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise UsageError(f"{compiler} cannot compile the ExecuTorch session: {line.strip()}"[:300])
        Path(partial).replace(output)
    finally:
        Path(partial).unlink(missing_ok=True)
    return output
