"""How many cores a process may use: what the kernel's files say of them."""

import os
from pathlib import Path

import pytest
from pyrexport.runtime.machine import usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each, of which a process may use six threads, on all four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 4, 7})
    for cpu in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "fs/cgroup/cpu").mkdir(parents=True)
    return tmp_path


def test_a_core_counts_once_however_many_threads_it_runs(machine: Path) -> None:
    assert usable_cores(machine) == 4


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "900000 100000\n"}, 4),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "what?"}, 4),
    ],
)
def test_a_containers_quota_bounds_them(machine: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (machine / "fs/cgroup" / name).write_text(text)
    assert usable_cores(machine) == expected


def test_where_the_kernel_says_nothing_processors_are_counted(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
