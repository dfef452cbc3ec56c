"""Runs what the Dockerfile runs, without a Docker daemon: each stage in an empty environment, a bundle in the last.

    python scripts/check_image.py BUNDLE [--python PROGRAM]

BUNDLE is one of the demonstration, for ONNX Runtime. RUN lines run as they stand there, with ARG and ENV. The base
image, COPY and USER are what only Docker has: an interpreter, a copy of what `.dockerignore` lets in, and this user
take their places.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from distribution import ROOT, alone, copy_source, sample


@dataclass
class Stage:
    """What a stage of a Dockerfile runs, and by which settings."""

    settings: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile."""
    found: list[Stage] = []
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append(Stage())
        elif word in ("ARG", "ENV") and found:
            name, _, value = rest.partition("=")
            found[-1].settings[name] = value
        elif word == "RUN":
            found[-1].commands.append(rest)
        elif word == "ENTRYPOINT":
            found[-1].entry = json.loads(rest)
    return found


def context(out: Path) -> Path:
    """What Docker would be given: a copy of the source, of which `.dockerignore` names what is to stay."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    for path in copy_source(out).iterdir():
        if not any(fnmatch(path.name, pattern) for pattern in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def main() -> int:
    """Run the stages, and a bundle; a step that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that stands for the base image's")
    given = parser.parse_args()
    with TemporaryDirectory() as name:
        out = Path(name)
        source, every = context(out / "source"), stages((ROOT / "Dockerfile").read_text("utf-8"))
        for number, stage in enumerate(every):
            folder = out / f"stage-{number}"
            subprocess.run([given.python, "-m", "venv", folder], check=True)
            own = alone(**stage.settings | {"WHEELS": str(out / "wheels")})
            own["PATH"] = f"{folder / 'bin'}:{own['PATH']}"
            for command in stage.commands:
                print(f"stage {number}: {command}", flush=True)
                subprocess.run(["bash", "-c", command], check=True, cwd=source, env=own, stdout=subprocess.DEVNULL)
        (entry,) = every[-1].entry
        latents = sample(folder / "bin", given.bundle.resolve(), out / "sample", entry=entry)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        print(f"the image's environment samples latents of shape {latents.shape}; it holds {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
