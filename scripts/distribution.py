"""The package as it is handed out: built from a clean copy, looked into, installed alone, and run."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("calibration", "cli", "export", "runtime", "targets")
BESIDE = ("py.typed", "targets/executorch/shim.cpp", "cli/reports/style.css")
"""Files of the package that are no modules."""
PLUGIN = "plugins/optimum"
PROMPT, SCHEDULE, FRAMES = "a red circle moving left", "2-2-1", 17


def copy_source(out: Path) -> Path:
    """Copy what git would keep, without the tests' data; a stale build/ folder would leak old modules into a wheel."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/data"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes((ROOT / name).read_bytes())
    return out


def build(out: Path, *kinds: str, part: str = ".") -> list[Path]:
    """Build what `python -m build` is asked for, `--wheel` say; without a kind, an sdist and the wheel of it.

    `part` is a folder with a distribution of its own.
    """
    source = copy_source(out / "source") / part
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return sorted(path for path in out.iterdir() if path.name.endswith((".whl", ".tar.gz")))


def check_wheel(wheel: Path) -> None:
    """The package and its metadata, and nothing else.

    Raises:
        AssertionError: a file is missing or stray.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    name, version = wheel.name.split("-")[:2]
    assert {file.split("/")[0] for file in names} == {"pyrexport", f"{name}-{version}.dist-info"}
    assert {f"pyrexport/{file}" for file in BESIDE} <= names
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{name}-{version}.dist-info/METADATA").decode()
    assert not re.findall(r"\]\((?!https://)", metadata)  # links into the repository lead nowhere on an index
    inside = {file.split("/")[1] for file in names if file.startswith("pyrexport/")}
    assert inside == {"__init__.py", "__main__.py", "py.typed", *PACKAGES}


def check_sdist(sdist: Path) -> None:
    """What the wheel is built of, the licence, and neither tests nor pages.

    Raises:
        AssertionError: a file is missing or stray.
    """
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"pyproject.toml", "LICENSE", "PACKAGE.md", "__init__.py", *BESIDE} <= files
    assert not [file for file in files if file.split("/")[0] in ("tests", "docs", "scripts", "plugins", "demo")]


def install(folder: Path, wheel: Path, python: str | Path = sys.executable) -> Path:
    """Make an environment with the wheel and the base dependencies alone; the folder of its programs."""
    subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt"]
    subprocess.run([*command, wheel], check=True, capture_output=True, env=alone())
    return folder / "bin"


def sample(programs: Path, bundle: Path, out: Path, *, entry: str = "pyrexport") -> np.ndarray:
    """Sample a bundle of the demonstration in an environment, far from the source; its latents [C, T, H, W].

    Raises:
        AssertionError: frames are missing, or latents are not finite.
    """
    out.mkdir()
    how = ["--prompt", PROMPT, "--schedule", SCHEDULE, "--save-latents", out / "latents.npy", "--quiet"]
    command = [programs / entry, "sample", bundle, *how, "-o", out / "frames"]
    subprocess.run(command, check=True, capture_output=True, cwd="/", env=alone())
    assert len(list((out / "frames").glob("*.png"))) == FRAMES
    latents = np.load(out / "latents.npy")
    assert np.isfinite(latents).all()
    return latents


def alone(**settings: str) -> dict[str, str]:
    """The process's settings without those that let an environment see another one's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | settings
