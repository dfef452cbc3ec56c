"""Paths with spaces and letters of other scripts, and systems that lack what this one has."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder whose name has spaces, quotes and letters of several scripts."""
    folder = tmp_path / "мои модели é 模型 'a' & b"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_build_sample_and_parity_take_paths_of_any_script(make_checkpoint, cli, odd):
    """Builds a bundle: fifteen seconds."""
    checkpoint = shutil.copytree(make_checkpoint("--blocks", "1"), odd / "контрольная точка")
    for command in (
        ("build", checkpoint, "--target", "ort", "-o", odd / "пакет 1", "--resolution", "17x64x64"),
        ("sample", odd / "пакет 1", "--prompt", "кот", "-o", odd / "видео 動画.npz", "--schedule", "1-1-1"),
        ("sample", odd / "пакет 1", "--prompt", "кот", "-o", odd / "видео 動画.mp4", "--schedule", "1-1-1", "--grid"),
        ("parity", odd / "пакет 1", "--reference", checkpoint, "--record", odd / "след é", "--schedule", "1-1-1"),
        ("parity", odd / "пакет 1", "--trace", odd / "след é", "--store"),
        ("inspect", odd / "пакет 1", "--verify"),
    ):
        result = cli(*command, "--quiet")
        assert result.exit_code == 0, result.output
    assert {"видео 動画.npz", "видео 動画.mp4", "видео 動画.png"} <= {path.name for path in odd.iterdir()}


def test_every_module_imports_where_there_are_no_locks_and_no_settings_of_the_allocator():
    """As on Windows and macOS: modules of POSIX alone are hidden, and the C library has no mallopt."""
    code = "\n".join(
        [
            "import ctypes, sys",
            "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None",
            "class Library:",
            "    pass",
            "real = ctypes.CDLL",
            "ctypes.CDLL = lambda name, *rest, **more: Library() if name is None else real(name, *rest, **more)",
            "import pyrexport.export.bundle.output, pyrexport.runtime.pipeline.pipeline, pyrexport.cli.hub",
            "import pyrexport.cli.build, pyrexport.cli.sample, pyrexport.cli.parity, pyrexport.cli.inspect",
            "from pyrexport.targets.ort import session",
            "session._give_buffers_back()",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
