"""Checks what a release hands out: files and descriptions of sdist and wheel, and the wheel alone in each Python.

    python scripts/check_release.py [--bundle BUNDLE] [--python PROGRAM]… [--twine PROGRAM]

In an empty environment with the wheel and its base dependencies, a bundle of the demonstration for ONNX Runtime is
sampled to latents and frames. `--python` names interpreters; else those of PATH are tried, and it says which are not
there.
"""

import argparse
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyrexport
from distribution import PLUGIN, ROOT, build, check_sdist, check_wheel, install, sample

PYTHONS = ("python3.11", "python3.12", "python3.13")
REGISTRATION = "optimum/commands/register/register_pyrexport.py"
TOLERANCE = 1e-4
"""Of latents between Pythons, relative L2: that of parity's chain, which other versions of NumPy would be held to."""


def version_of(python: str) -> str | None:
    """An interpreter's version, if it is there and can make environments."""
    code = "import ensurepip, platform, venv; print(platform.python_version())"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_files(out: Path, twine: list[str]) -> Path:
    """Build and look into sdist and wheel, and the plug-in for optimum; the wheel."""
    wheel, sdist = sorted(build(out), key=lambda path: path.suffix != ".whl")
    check_wheel(wheel)
    check_sdist(sdist)
    assert wheel.name.split("-")[1] == pyrexport.__version__
    (plugin,) = build(out / "plugin", "--wheel", part=PLUGIN)
    assert [file for file in zipfile.ZipFile(plugin).namelist() if "dist-info" not in file] == [REGISTRATION]
    subprocess.run([*twine, "check", "--strict", wheel, sdist, plugin], check=True)
    for path in (wheel, sdist, plugin):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, files and description as they must be", flush=True)
    return wheel


def main() -> int:
    """Check a release; 1 where no interpreter was there to run the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of the demonstration, for ONNX Runtime; else it is built")
    parser.add_argument("--python", action="append", help="an interpreter; can be given again")
    parser.add_argument("--twine", help="its program, where it is installed elsewhere")
    given = parser.parse_args()
    latents: list[np.ndarray] = []
    with TemporaryDirectory() as name:
        out = Path(name)
        wheel = check_files(out, [given.twine] if given.twine else [sys.executable, "-m", "twine"])
        bundle = given.bundle or pyrexport.build(ROOT / "tests/data/moving-shapes", out / "shapes.pyrx", target="ort")
        for python in given.python or PYTHONS:
            version = version_of(python)
            if version is None:
                print(f"{python}: not there, not tried")
                continue
            programs = install(out / f"environment-{version}", wheel, python)
            latents.append(sample(programs, bundle.resolve(), out / f"sample-{version}"))
            apart = float(np.linalg.norm(latents[-1] - latents[0]) / np.linalg.norm(latents[0]))
            assert apart <= TOLERANCE, (python, apart)
            print(
                f"Python {version}, {platform.machine()}: the wheel alone samples; {apart:.0e} from the first",
                flush=True,
            )
    return not latents


if __name__ == "__main__":
    sys.exit(main())
