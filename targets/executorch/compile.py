"""The session's library, compiled from `shim.cpp` against the libraries and headers of the installed wheel."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ...runtime.errors import UsageError
from ...runtime.files import cache_folder, write_whole, written_beside

__all__ = ["NoCompiler", "library_file"]

SOURCE = Path(__file__).with_name("shim.cpp")
LIBRARIES = ("executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool")


class NoCompiler(Exception):
    """There is no C++ compiler."""


@contextmanager
def library_file() -> Iterator[Path]:
    """The library, to be loaded inside, compiled if it is not there whole for this wheel and this compiler.

    It is kept in the user's cache folder with its hash, or only for the moment where that cannot be written.

    Raises:
        NoCompiler: neither `$CXX`, g++, clang++ nor c++ is there.
        UsageError: executorch is not installed, or the compiler fails.
    """
    spec = find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("executorch is not installed: pip install executorch, or its wheel alone with --no-deps")
    wheel = Path(next(iter(spec.submodule_search_locations)))
    compiler = _compiler()
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [version("executorch"), str(wheel), *compiler, told, SOURCE.read_text("utf-8")]
    key = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    cached = cache_folder() / f"executorch-{key[:16]}.so"
    if _is_whole(cached):
        yield cached
        return
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
    if os.access(cached.parent, os.W_OK):
        _compile(compiler, wheel, cached)
        yield cached
        return
    with tempfile.TemporaryDirectory(prefix="pyrexport-") as folder:
        _compile(compiler, wheel, Path(folder) / cached.name)
        yield Path(folder) / cached.name


def _hash_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Loading half a library would end the process."""
    with suppress(OSError):
        return _hash_file(library).read_text("utf-8") == hashlib.sha256(library.read_bytes()).hexdigest()
    return False


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["clang++"], ["c++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    raise NoCompiler(f"no C++ compiler is here ({'$CXX is ' + chosen[0] if chosen else 'g++, clang++ or c++'})")


def _compile(compiler: list[str], wheel: Path, output: Path) -> None:
    """Compile beside and rename, so that another process never loads half a library."""
    include, libraries = wheel / "include", wheel / "lib"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w"]
    defines = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
    includes = [f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10"]
    whole = ["-Wl,--no-as-needed", *(f"-l{name}" for name in LIBRARIES), "-Wl,--as-needed"]
    links = [f"-L{libraries}", "-lexecutorch", *whole, f"-Wl,-rpath,{libraries}"]
    with written_beside(output) as partial:
        command = [*compiler, *flags, *defines, *includes, str(SOURCE), "-o", str(partial), *links]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        data = partial.read_bytes() if partial.is_file() else b""
        if done.returncode or not data:
            lines = done.stderr.splitlines() or [f"it ended with code {done.returncode} and {len(data)} bytes"]
            line = next((line for line in lines if "error" in line), lines[0])
            raise UsageError(f"{' '.join(compiler)} cannot compile the ExecuTorch session: {line.strip()}"[:300])
    write_whole(_hash_file(output), hashlib.sha256(data).hexdigest().encode())
